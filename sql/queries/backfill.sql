-- The queue of wallets. What a worker brings is taken only under the token of a lease that has not expired; all times
-- are the database's.

-- name: chosen
create temp table backfill_chosen (user_address text collate "C" primary key)

-- name: choose
insert into backfill_chosen select unnest(%(users)s::text[]) on conflict do nothing

-- Where wallets can be looked up one after the other in an index: the partitions, or a table that has none.
-- name: parts_of_fills
select n.nspname, c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
where c.oid in (select relid from pg_partition_tree('fills') where isleaf) or (c.oid = 'fills'::regclass and c.relkind = 'r')

-- Wallet by wallet through the index: a day has millions of rows and some ten thousand wallets.
-- name: wallets_of_part
with recursive found as (
    (select f.user_address from {part} f order by f.user_address limit 1)
    union all
    select (select f.user_address from {part} f where f.user_address > found.user_address
            order by f.user_address limit 1)
    from found where found.user_address is not null
)
select user_address from found where user_address is not null

-- name: wallets_of_universe
select wallet_id from wallet_universe_current union select wallet_id from wallet_universe_members

-- name: wallets_chosen
select user_address from backfill_chosen

-- name: enlist
insert into backfill_progress (user_address, wanted_from, wanted_to)
select wallet.user_address, %(since)s, %(until)s from ({wallets}) wallet (user_address)
order by 1
on conflict do nothing

-- Ask for a window. What is leased goes on with what it was leased for; the rest is found out when it is done. A
-- wallet that failed rests for as many hours as it was tried, unless it is named.
-- name: want
update backfill_progress p
set wanted_from = %(since)s, wanted_to = %(until)s,
    state = case when p.state = 'running' then 'running'
                 when not isempty(asked.todo) or not isempty(asked.slices) then 'pending'
                 when p.cut_off && tstzrange(%(since)s, %(until)s) then 'truncated' else 'complete' end,
    attempts = case when p.state = 'failed' and %(named)s then 0 else p.attempts end,
    updated_at = clock_timestamp()
from backfill_progress q
cross join lateral (select
    tstzmultirange(tstzrange(%(since)s, %(until)s)) - q.covered - q.cut_off as todo,
    tstzmultirange(tstzrange(%(since)s, %(until)s)
                   * tstzrange(date_trunc('second', now()) - interval '13 days', null)) - q.slices_covered as slices
    ) asked
where q.user_address = p.user_address
  and (not %(named)s or p.user_address in (select c.user_address from backfill_chosen c))
  and case p.state
      when 'failed' then %(named)s or p.updated_at < clock_timestamp() - p.attempts * interval '1 hour'
      else (p.wanted_from, p.wanted_to) is distinct from (%(since)s, %(until)s) end

-- name: give_up
update backfill_progress
set state = 'failed', error = format('%%s workers in a row ended while they worked on it', attempts),
    lease_owner = null, lease_token = null, lease_expires_at = null, updated_at = clock_timestamp()
where state = 'running' and lease_expires_at < clock_timestamp() and attempts >= %(attempts)s

-- name: claim
with free as (
    select user_address from backfill_progress
    where state in ('pending', 'running')
      and (state = 'pending' or lease_expires_at < clock_timestamp())
      and (not %(named)s or user_address in (select c.user_address from backfill_chosen c))
      and (%(shard)s::integer is null or backfill_shard(user_address, %(workers)s) = %(shard)s)
    order by user_address {order} limit %(most)s
    for update skip locked
)
update backfill_progress p
set state = 'running', lease_owner = %(owner)s, lease_token = gen_random_uuid(),
    lease_expires_at = clock_timestamp() + %(lease)s, attempts = p.attempts + 1,
    started_at = coalesce(p.started_at, clock_timestamp()), error = null, updated_at = clock_timestamp()
from free where p.user_address = free.user_address
returning p.user_address, p.lease_token, backfill_todo(p), backfill_todo_slices(p)

-- name: renew
update backfill_progress set lease_expires_at = clock_timestamp() + %(lease)s
where user_address in (
    select user_address from backfill_progress
    where state = 'running' and lease_owner = %(owner)s and lease_expires_at > clock_timestamp()
    for update skip locked)

-- name: keep_page
update backfill_progress
set covered = covered + %(covered)s, cut_off = cut_off + %(cut_off)s,
    slices_covered = slices_covered + %(slices_covered)s,
    history_from = least(history_from, %(history_from)s), pages = pages + 1, weight = weight + %(weight)s,
    fills_count = fills_count + %(fills)s, oldest_fill_time = least(oldest_fill_time, %(oldest)s),
    attempts = 0, lease_expires_at = clock_timestamp() + %(lease)s, updated_at = clock_timestamp()
where user_address = %(user)s and lease_token = %(token)s and lease_expires_at > clock_timestamp()
returning true

-- How many fills there are since the oldest one served, where more than a page was and nothing older.
-- name: fills_since_history_began
select p.history_from, p.wanted_from, (select count(*) from (select from fills f
    where f.user_address = p.user_address and f.time >= p.history_from limit %(most)s) found)
from backfill_progress p
where p.user_address = %(user)s and p.lease_token = %(token)s and p.history_from > p.wanted_from

-- name: cut_off
update backfill_progress set covered = covered - %(range)s, cut_off = cut_off + %(range)s
where user_address = %(user)s and lease_token = %(token)s

-- name: finish
update backfill_progress p
set state = backfill_resting_state(p), completed_at = clock_timestamp(), attempts = 0, error = null,
    lease_owner = null, lease_token = null, lease_expires_at = null, updated_at = clock_timestamp()
where user_address = %(user)s and lease_token = %(token)s and lease_expires_at > clock_timestamp()
returning state

-- name: fail
update backfill_progress
set state = 'failed', error = %(error)s, attempts = greatest(attempts, 1),
    lease_owner = null, lease_token = null, lease_expires_at = null, updated_at = clock_timestamp()
where user_address = %(user)s and lease_token = %(token)s
returning true

-- name: release
update backfill_progress
set state = backfill_resting_state(p), attempts = greatest(p.attempts - 1, 0),
    lease_owner = null, lease_token = null, lease_expires_at = null, updated_at = clock_timestamp()
from (select user_address from backfill_progress
      where state = 'running' and lease_owner = %(owner)s for update skip locked) mine,
     backfill_progress p
where backfill_progress.user_address = mine.user_address and p.user_address = mine.user_address

-- name: left
select count(*), count(*) filter (where %(shard)s::integer is null or backfill_shard(user_address, %(workers)s) = %(shard)s)
from backfill_progress
where state in ('pending', 'running')
  and (not %(named)s or user_address in (select c.user_address from backfill_chosen c))

-- name: states
select state, count(*), sum(fills_count)::bigint, sum(pages)::bigint, sum(weight)::bigint from backfill_progress group by state

-- The newest run of each worker that works, or did so within a day.
-- name: workers
select distinct on (r.member) r.member, r.host, r.status, r.started_at, r.finished_at,
       coalesce(r.heard_at, r.started_at) as heard_at, r.units_ok, r.units_failed, r.rows_served, r.requests, r.weight,
       clock_timestamp() as now
from ingestion_runs r
where r.source = 'hyperliquid' and r.channel = 'backfill' and r.status <> 'skipped'
  and (r.status = 'running' or r.finished_at > clock_timestamp() - interval '1 day')
order by r.member, r.started_at desc

-- name: left_by_shard
select backfill_shard(user_address, %(workers)s), count(*) from backfill_progress
where state in ('pending', 'running') group by 1

-- name: enlisted_since
select exists (select from ingest_cursors where (source, channel, name) = ('hyperliquid', 'backfill', 'enlisted')
    and updated_at > %(began)s and value = to_jsonb(array[%(since)s, %(until)s]::text[]))

-- name: enlisted
insert into ingest_cursors as stored (source, channel, name, value, updated_at)
values ('hyperliquid', 'backfill', 'enlisted', to_jsonb(array[%(since)s, %(until)s]::text[]), clock_timestamp())
on conflict (source, channel, name) do update set value = excluded.value, updated_at = excluded.updated_at

-- name: choose_all
insert into backfill_chosen select wallet.user_address from ({wallets}) wallet (user_address) on conflict do nothing

-- name: count_todo
select count(*) from backfill_chosen c left join backfill_progress p on p.user_address = c.user_address
where not tstzmultirange(tstzrange(%(since)s, %(until)s))
    <@ (coalesce(p.covered, '{}'::tstzmultirange) + coalesce(p.cut_off, '{}'::tstzmultirange))

-- name: measured
select count(*), avg(pages), avg(weight) from backfill_progress where state in ('complete', 'truncated') and pages > 0
