-- The queue of wallets. What a worker brings is taken only under the token of a lease that has not expired; all times
-- are the database's.

-- name: chosen
create temp table backfill_chosen (user_address text collate "C" primary key)

-- name: choose
insert into backfill_chosen select unnest(%(users)s::text[]) on conflict do nothing

-- Where wallets can be looked up one after the other in an index: partitions or chunks, or a table that has none.
-- name: parts_of_fills
with recursive part as (
    select 'fills'::regclass::oid as oid
    union all
    select i.inhrelid from pg_inherits i join part on part.oid = i.inhparent
)
select n.nspname, c.relname from part join pg_class c on c.oid = part.oid join pg_namespace n on n.oid = c.relnamespace
where c.relkind = 'r' and not exists (select from pg_inherits i where i.inhparent = part.oid)

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

-- The same where recursion is not supported: on a distributed table.
-- name: wallets_of_part_at_once
select distinct user_address from {part}

-- name: wallets_of_universe
select wallet_id from wallet_universe_current union select wallet_id from wallet_universe_members

-- name: wallets_chosen
select user_address from backfill_chosen

-- name: enlist
insert into backfill_progress (user_address, wanted_from, wanted_to)
select wallet.user_address, %(since)s, %(until)s from ({wallets}) wallet (user_address)
order by 1
on conflict do nothing

-- Ask for a window. What is leased goes on with what it was leased for; the rest is found out when it is done. What
-- somebody wants of a wallet that is not done is taken back only by who names it. One that failed rests for as many
-- hours as it was tried, unless it is named. What was pending stays so, as what is doubtful is decided when nothing is left.
-- name: want
update backfill_progress p
set wanted_from = asked.since, wanted_to = asked.until,
    state = case when p.state = 'running' then 'running'
                 when p.state in ('pending', 'failed') or not isempty(rest.todo) or not isempty(rest.slices) then 'pending'
                 when not isempty(p.cut_off) then 'truncated' else 'complete' end,
    attempts = case when p.state = 'failed' and %(named)s then 0 else p.attempts end,
    updated_at = clock_timestamp()
from backfill_progress q
cross join lateral (select
    case when q.state in ('pending', 'running') and not %(named)s then least(q.wanted_from, %(since)s)
         else %(since)s end as since,
    case when q.state in ('pending', 'running') and not %(named)s then greatest(q.wanted_to, %(until)s)
         else %(until)s end as until) asked
cross join lateral (select
    backfill_todo(asked.since, asked.until, q.covered, q.cut_off) as todo,
    backfill_todo_slices(asked.since, asked.until, q.slices_covered) as slices) rest
where q.user_address = p.user_address
  and (not %(named)s or exists (select from backfill_chosen c where c.user_address = p.user_address))
  and case p.state
      when 'failed' then %(named)s or p.updated_at < clock_timestamp() - p.attempts * interval '1 hour'
      else (p.wanted_from, p.wanted_to) is distinct from (asked.since, asked.until) end

-- name: give_up
update backfill_progress
set state = 'failed', error = format('%%s workers in a row ended while they worked on it', attempts),
    lease_owner = null, lease_token = null, lease_expires_at = null, updated_at = clock_timestamp()
where state = 'running' and lease_expires_at < clock_timestamp() and attempts >= %(attempts)s
returning user_address

-- name: claim
with free as (
    select user_address from backfill_progress
    where state in ('pending', 'running')
      and (state = 'pending' or lease_expires_at < clock_timestamp())
      and (not %(named)s or exists (select from backfill_chosen c where c.user_address = backfill_progress.user_address))
      and (%(shard)s::integer is null or backfill_shard(user_address, %(workers)s) = %(shard)s)
    order by user_address {order} limit %(most)s
    for update skip locked
)
update backfill_progress p
set state = 'running', lease_owner = %(owner)s, lease_token = gen_random_uuid(),
    lease_expires_at = clock_timestamp() + %(lease)s, attempts = p.attempts + 1,
    started_at = coalesce(p.started_at, clock_timestamp()), error = null, updated_at = clock_timestamp()
from free where p.user_address = free.user_address
returning p.user_address, p.lease_token, backfill_todo(p.wanted_from, p.wanted_to, p.covered + p.doubtful, p.cut_off),
          backfill_todo_slices(p.wanted_from, p.wanted_to, p.slices_covered)

-- name: renew
update backfill_progress set lease_expires_at = clock_timestamp() + %(lease)s
where user_address in (
    select user_address from backfill_progress
    where state = 'running' and lease_owner = %(owner)s and lease_expires_at > clock_timestamp()
    for update skip locked)

-- name: keep_page
update backfill_progress
set covered = covered + (%(covered)s - %(doubtful)s), cut_off = cut_off + %(cut_off)s,
    slices_covered = slices_covered + %(slices_covered)s,
    doubtful = doubtful + %(doubtful)s,
    doubtful_at = case when isempty(%(doubtful)s) then doubtful_at else coalesce(doubtful_at, hlcli_now()) end,
    pages = pages + 1, weight = weight + %(weight)s,
    fills_count = fills_count + %(fills)s, oldest_fill_time = least(oldest_fill_time, %(oldest)s),
    attempts = 0, lease_expires_at = clock_timestamp() + %(lease)s, updated_at = clock_timestamp()
where user_address = %(user)s and lease_token = %(token)s and lease_expires_at > clock_timestamp()
returning true

-- name: doubtful
select doubtful, 'epoch'::timestamptz + oldest_fill_time * interval '1 ms', doubtful_at, hlcli_now() from backfill_progress
where user_address = %(user)s and lease_token = %(token)s and not isempty(doubtful)

-- By itself, as `fills` may be distributed.
-- name: count_fills
select count(*) from (
    select from fills where user_address = %(user)s and time >= %(since)s and time < %(until)s limit %(most)s) found

-- name: decide
update backfill_progress
set covered = covered + (doubtful - %(cut_off)s), cut_off = cut_off + (%(cut_off)s - covered),
    doubtful = '{}', doubtful_at = null
where user_address = %(user)s and lease_token = %(token)s

-- name: finish
with done as (
    select user_address,
           case when not isempty(backfill_todo(wanted_from, wanted_to, covered, cut_off))
                     or not isempty(backfill_todo_slices(wanted_from, wanted_to, slices_covered)) then 'pending'
                when not isempty(cut_off) then 'truncated'
                else 'complete' end as state
    from backfill_progress
    where user_address = %(user)s and lease_token = %(token)s and lease_expires_at > clock_timestamp()
    for update
)
update backfill_progress p
set state = done.state, completed_at = case done.state when 'pending' then p.completed_at else clock_timestamp() end,
    attempts = 0, error = null, lease_owner = null, lease_token = null, lease_expires_at = null,
    updated_at = clock_timestamp()
from done where p.user_address = done.user_address
returning p.state

-- name: fail
update backfill_progress
set state = 'failed', error = %(error)s, attempts = greatest(attempts, 1),
    lease_owner = null, lease_token = null, lease_expires_at = null, updated_at = clock_timestamp()
where user_address = %(user)s and lease_token = %(token)s
returning true

-- What failed in an outage is not the wallets' fault.
-- name: reopen
update backfill_progress set state = 'pending', error = null, attempts = 0, updated_at = clock_timestamp()
where user_address = any (%(users)s) and state = 'failed'

-- Pending, though nothing may be left to ask: what is doubtful is still to be decided.
-- name: release
update backfill_progress
set state = 'pending', attempts = greatest(attempts - 1, 0),
    lease_owner = null, lease_token = null, lease_expires_at = null, updated_at = clock_timestamp()
where user_address in (select user_address from backfill_progress
                       where state = 'running' and lease_owner = %(owner)s for update skip locked)

-- name: holds_any
select exists (select from backfill_progress where state = 'running' and lease_owner = %(owner)s)

-- name: left
select count(*), count(*) filter (where %(shard)s::integer is null or backfill_shard(user_address, %(workers)s) = %(shard)s)
from backfill_progress
where state in ('pending', 'running')
  and (not %(named)s or exists (select from backfill_chosen c where c.user_address = backfill_progress.user_address))

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

-- Whether the wallets need not be looked for: another worker did so meanwhile, or somebody lately, and there is work.
-- name: is_enlisted
select exists (select from ingest_cursors where (source, channel, name) = ('hyperliquid', 'backfill', 'enlisted')
    and value = to_jsonb(array[%(since)s, %(until)s]::text[])
    and (updated_at > %(began)s
         or updated_at > %(began)s - interval '6 hours'
            and exists (select from backfill_progress where state in ('pending', 'running'))))

-- name: enlisted
insert into ingest_cursors as stored (source, channel, name, value, updated_at)
values ('hyperliquid', 'backfill', 'enlisted', to_jsonb(array[%(since)s, %(until)s]::text[]), clock_timestamp())
on conflict (source, channel, name) do update set value = excluded.value, updated_at = excluded.updated_at

-- name: choose_all
insert into backfill_chosen select wallet.user_address from ({wallets}) wallet (user_address) on conflict do nothing

-- name: count_todo
select count(*) from backfill_chosen c left join backfill_progress p on p.user_address = c.user_address
cross join lateral (select not %(named)s and coalesce(p.state in ('pending', 'running'), false) as is_kept) wider
where not tstzmultirange(tstzrange(
          case when is_kept then least(p.wanted_from, %(since)s) else %(since)s end,
          case when is_kept then greatest(p.wanted_to, %(until)s) else %(until)s end))
    <@ (coalesce(p.covered, '{}'::tstzmultirange) + coalesce(p.cut_off, '{}'::tstzmultirange))
  and (%(shard)s::integer is null or backfill_shard(c.user_address, %(workers)s) = %(shard)s)

-- name: wallets_of_queue
select user_address from backfill_progress

-- name: measured
select count(*), avg(pages), avg(weight) from backfill_progress where state in ('complete', 'truncated') and pages > 0
