-- The backfill of fills from the API: what is wanted of each wallet, what is there, and who works on it.

alter table ingestion_runs
    add column member   text not null default '',
    add column lock_key integer,
    add column heard_at timestamptz;
comment on column ingestion_runs.member is
    'which of several runs that may work side by side: of a backfill worker/workers@egress key; else empty';
comment on column ingestion_runs.lock_key is 'objid of the advisory lock that the run holds while it is alive';
comment on column ingestion_runs.heard_at is 'when the run last said that it is alive; NULL: never';

-- A queue: it stays a plain local table on every engine (`for update skip locked`).
create table backfill_progress (
    user_address     text collate "C" primary key,
    state            text not null default 'pending',
    wanted_from      timestamptz not null,
    wanted_to        timestamptz not null,
    covered          tstzmultirange not null default '{}',
    cut_off          tstzmultirange not null default '{}',
    slices_covered   tstzmultirange not null default '{}',
    coverage_from    timestamptz generated always as (lower(covered)) stored,
    coverage_to      timestamptz generated always as (upper(covered)) stored,
    doubtful         tstzmultirange not null default '{}',
    doubtful_at      timestamptz,
    completed        boolean not null generated always as (state = 'complete') stored,
    started_at       timestamptz,
    completed_at     timestamptz,
    fills_count      bigint not null default 0,
    oldest_fill_time bigint,
    pages            bigint not null default 0,
    weight           bigint not null default 0,
    attempts         integer not null default 0,
    lease_owner      uuid,
    lease_token      uuid,
    lease_expires_at timestamptz,
    error            text,
    updated_at       timestamptz not null default clock_timestamp(),
    constraint backfill_progress_user check (user_address ~ '^0x[0-9a-f]{40}$'),
    constraint backfill_progress_state check (state in ('pending', 'running', 'complete', 'truncated', 'failed')),
    constraint backfill_progress_wanted check (
        isfinite(wanted_from) and isfinite(wanted_to) and wanted_from < wanted_to),
    constraint backfill_progress_lease check (
        num_nonnulls(lease_owner, lease_token, lease_expires_at) = case when state = 'running' then 3 else 0 end),
    constraint backfill_progress_error check (state <> 'failed' or error is not null)
) with (fillfactor = 80);
-- By wallet: each worker goes through those that are left in this order.
create index backfill_progress_left on backfill_progress (user_address) where state in ('pending', 'running');
create index backfill_progress_leased on backfill_progress (lease_expires_at) where state = 'running';
comment on table backfill_progress is
    'One row a wallet whose fills are asked of the API: a queue for any number of workers. What is left to ask is wanted less covered and cut_off.';
comment on column backfill_progress.user_address is 'lower case';
comment on column backfill_progress.state is
    'pending; running: leased; complete; truncated: done, but the source does not serve all that was ever wanted; failed: see error. Slices of TWAPs that the exchange has forgotten are no part of it';
comment on column backfill_progress.wanted_from is 'the window last asked for begins here, and ends before wanted_to';
comment on column backfill_progress.covered is 'times of which every fill that the API serves is in table fills';
comment on column backfill_progress.cut_off is 'wanted times that the API''s own limit on a wallet''s history has cut off';
comment on column backfill_progress.slices_covered is 'as covered, of the endpoint of TWAP slices, which keeps some two weeks only';
comment on column backfill_progress.coverage_from is 'where covered begins, as coverage_to is where it ends';
comment on column backfill_progress.doubtful is
    'times before the oldest fill that the API served: when nothing is left to ask, it is decided whether its limit has cut them off, or they are covered';
comment on column backfill_progress.doubtful_at is 'when the first of them were asked for';
comment on column backfill_progress.completed is 'never true of a truncated wallet';
comment on column backfill_progress.completed_at is 'when it was last done, complete or truncated';
comment on column backfill_progress.fills_count is
    'fills served within covered, be they new to table fills or not; a slice that both endpoints serve counts twice';
comment on column backfill_progress.started_at is 'when it was first leased';
comment on column backfill_progress.oldest_fill_time is 'milliseconds since 1970, of the fills counted';
comment on column backfill_progress.weight is 'API weight that its pages cost';
comment on column backfill_progress.attempts is 'how often in a row it was leased in vain: no page came of it, nor did its worker give it back';
comment on column backfill_progress.lease_owner is 'ingestion_runs.run_id of the worker';
comment on column backfill_progress.lease_expires_at is 'by the database''s clock; prolonged by each page, and by a worker that is alive';
comment on column backfill_progress.error is 'why it failed';
comment on column backfill_progress.updated_at is 'when the row last changed, but for a lease that was prolonged';
comment on column backfill_progress.lease_token is 'new with every lease: what an older one brings is refused';

-- Which of so many workers a wallet belongs to, and so which begins with it; deterministic, from 0.
create function backfill_shard(user_address text, workers integer) returns integer
language sql immutable parallel safe
return ((hashtextextended(user_address, 0) & 9223372036854775807) % workers)::integer;

create function backfill_todo(
    wanted_from timestamptz, wanted_to timestamptz, covered tstzmultirange, cut_off tstzmultirange
) returns tstzmultirange
language sql immutable parallel safe
return tstzmultirange(tstzrange(wanted_from, wanted_to)) - covered - cut_off;
comment on function backfill_todo is 'What is left to ask of a wallet''s fills.';

-- Slices older than the exchange keeps are not asked for: it would cost as much as a wallet's fills and bring nothing.
create function backfill_todo_slices(
    wanted_from timestamptz, wanted_to timestamptz, slices_covered tstzmultirange
) returns tstzmultirange
language sql stable parallel safe
return tstzmultirange(tstzrange(wanted_from, wanted_to)
                      * tstzrange(date_trunc('second', now()) - interval '13 days', null)) - slices_covered;
comment on function backfill_todo_slices is 'What is left to ask of a wallet''s TWAP slices.';

-- budget_reserve() of sql/0001_foundation.sql, but for two things while no urgent caller has asked for ten minutes:
--   * Bulk callers leave no reserve: of full pages, which cost a tenth of the limit each, it would take one of ten.
--     The first urgent caller then waits, ahead of all others, for the next page to leave the window.
--   * They may run ahead of their pace a little more. It counts a page as full until its answer tells what it did
--     cost, so that short pages of a slow server would be asked one by one.
create or replace function budget_reserve(
    key text, waiter_id uuid, asked bigint, rank integer,
    weight_limit bigint, request_limit bigint, margin_s double precision
) returns table (wait_s double precision, granted_second bigint)
language plpgsql as $$
declare
    gate        rate_budget%rowtype;
    now_s       double precision;
    waits_since timestamptz;
    oldest      bigint;
    used        bigint;
    used_urgent bigint;
    sent        bigint;
    ahead       bigint;
    ahead_paced bigint;
    ahead_count bigint;
    ceiling     bigint := weight_limit;
    per_second  double precision;
    paced       boolean;
    urgent_near boolean;
    wait        double precision := 0;
    credit_s    double precision := 3;
    window_s    constant double precision := 60;
begin
    insert into rate_budget (egress_key) values (key) on conflict do nothing;
    select * into gate from rate_budget where egress_key = key for update;
    now_s := extract(epoch from clock_timestamp());

    -- A bucket counts until all of its second is out of the window. Buckets from the future come from a clock
    -- that was set back; they would close the gate for as long as the clock was wrong.
    oldest := floor(now_s - window_s - margin_s)::bigint;
    delete from rate_budget_buckets b where b.egress_key = key and (b.second < oldest or b.second > now_s + 5);
    delete from rate_budget_waiters w where w.egress_key = key
        and (w.expires_at < to_timestamp(now_s) or w.expires_at > to_timestamp(now_s + 60));

    -- So would a refusal (at most five minutes long) and a pace.
    if gate.blocked_until > to_timestamp(now_s + 600) then
        gate.blocked_until := '-infinity';
    end if;
    if gate.paced_until > to_timestamp(now_s + 600) then
        gate.paced_until := '-infinity';
    end if;
    update rate_budget r set blocked_until = gate.blocked_until, paced_until = gate.paced_until
        where r.egress_key = key and (r.blocked_until, r.paced_until) <> (gate.blocked_until, gate.paced_until);

    select coalesce(sum(b.weight), 0), coalesce(sum(b.urgent_weight), 0), coalesce(sum(b.requests), 0)
        into used, used_urgent, sent from rate_budget_buckets b where b.egress_key = key;
    select w.since into waits_since from rate_budget_waiters w where w.egress_key = key and w.waiter = waiter_id;
    waits_since := coalesce(waits_since, to_timestamp(now_s));
    select coalesce(sum(w.weight), 0), count(*), coalesce(sum(w.weight) filter (where w.priority > 0), 0)
        into ahead, ahead_count, ahead_paced
        from rate_budget_waiters w
        where w.egress_key = key and w.waiter <> waiter_id
          and (w.priority, w.since, w.waiter) < (rank, waits_since, waiter_id);

    if rank = 0 then
        update rate_budget set urgent_at = to_timestamp(now_s) where egress_key = key;
    end if;
    urgent_near := gate.urgent_at > to_timestamp(now_s - 600);
    paced := rank >= 2 or (rank = 1 and urgent_near);
    if paced and urgent_near then
        ceiling := weight_limit - greatest(weight_limit / 50, 2);
    elsif paced then
        credit_s := credit_s + least(asked * window_s / weight_limit / 3, 2);
    end if;

    if gate.blocked_until > to_timestamp(now_s) then
        wait := least(extract(epoch from gate.blocked_until) - now_s, 5);
    elsif used + ahead + asked > ceiling and not (used = 0 and ahead = 0) then
        -- When enough of the oldest buckets have left the window.
        select min(freed.second) + 1 + window_s + margin_s - now_s into wait
            from (select b.second, sum(b.weight) over (order by b.second) as total
                  from rate_budget_buckets b where b.egress_key = key) freed
            where freed.total >= used + ahead + asked - ceiling;
        wait := coalesce(wait, 1);
    elsif request_limit is not null and sent + ahead_count + 1 > request_limit then
        select min(freed.second) + 1 + window_s + margin_s - now_s into wait
            from (select b.second, sum(b.requests) over (order by b.second) as total
                  from rate_budget_buckets b where b.egress_key = key) freed
            where freed.total >= sent + ahead_count + 1 - request_limit;
        wait := coalesce(wait, 1);
    elsif paced then
        per_second := greatest((weight_limit - used_urgent) / window_s, weight_limit / window_s / 10);
        wait := extract(epoch from greatest(gate.paced_until, to_timestamp(now_s - credit_s))) - now_s
                + ahead_paced / per_second;
    end if;

    if wait > 0 then
        -- A waiter that does not come back soon is dead and must not hold up the others.
        insert into rate_budget_waiters (egress_key, waiter, priority, weight, since, expires_at)
            values (key, waiter_id, rank, asked, waits_since, to_timestamp(now_s + 4))
            on conflict (egress_key, waiter) do update set expires_at = excluded.expires_at;
        return query select least(greatest(wait, 0.01), 1.0), null::bigint;
        return;
    end if;

    if paced then
        update rate_budget set paced_until =
            greatest(gate.paced_until, to_timestamp(now_s - credit_s)) + make_interval(secs => asked / per_second)
            where egress_key = key;
    end if;
    delete from rate_budget_waiters w where w.egress_key = key and w.waiter = waiter_id;
    insert into rate_budget_buckets as b (egress_key, second, weight, urgent_weight, requests)
        values (key, floor(now_s)::bigint, asked, case when rank = 0 then asked else 0 end, 1)
        on conflict (egress_key, second) do update
            set weight = b.weight + excluded.weight, urgent_weight = b.urgent_weight + excluded.urgent_weight,
                requests = b.requests + 1;
    return query select 0::double precision, floor(now_s)::bigint;
end
$$;
