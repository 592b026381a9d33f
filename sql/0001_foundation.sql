-- What every job stands on: the ledger, quarantine, cursors and the shared weight budget.
-- These tables stay plain and local on every engine.

create table ingestion_runs (
    run_id        uuid primary key,
    source        text not null,
    channel       text not null,
    status        text not null,
    started_at    timestamptz not null default clock_timestamp(),
    finished_at   timestamptz,
    units_ok      bigint not null default 0,
    units_failed  bigint not null default 0,
    rows_served   bigint not null default 0,
    rows_inserted bigint not null default 0,
    rows_updated  bigint not null default 0,
    rows_unchanged bigint not null default 0,
    rows_duplicate bigint not null default 0,
    rows_rejected bigint not null default 0,
    rows_failed   bigint not null default 0,
    requests      bigint not null default 0,
    weight        bigint not null default 0,
    exit_code     integer,
    error         text,
    host          text not null,
    pid           integer not null,
    version       text not null,
    details       jsonb not null default '{}',
    constraint ingestion_runs_status check (
        status in ('running', 'ok', 'partial', 'failed', 'skipped', 'interrupted', 'abandoned'))
);
create index ingestion_runs_channel on ingestion_runs (source, channel, started_at desc);
create index ingestion_runs_started on ingestion_runs (started_at);
comment on table ingestion_runs is
    'One row a run. rows_served = inserted + updated + unchanged + duplicate + rejected + failed.';
comment on column ingestion_runs.status is
    'skipped: another run held the lock; interrupted: ended by a signal; abandoned: found dead by a later run';
comment on column ingestion_runs.rows_unchanged is 'rows that were stored already, with the same values';
comment on column ingestion_runs.rows_duplicate is 'rows that stood twice in what one request served';
comment on column ingestion_runs.weight is 'API weight charged to the budget of the egress key';

create table rejected_rows (
    table_name    text not null,
    row_key       text not null,
    reason        text not null,
    column_name   text,
    payload       text not null,
    times         bigint not null default 1,
    first_run_id  uuid not null,
    last_run_id   uuid not null,
    first_seen_at timestamptz not null default clock_timestamp(),
    last_seen_at  timestamptz not null default clock_timestamp(),
    primary key (table_name, row_key, reason)
);
comment on table rejected_rows is
    'Quarantine: rows that a source served and no table could take. One row per key and reason, however often.';
comment on column rejected_rows.payload is 'the row as JSON text, cut at 20,000 characters';

create table ingest_cursors (
    source        text not null,
    channel       text not null,
    name          text not null,
    value         jsonb not null,
    updated_at    timestamptz not null,
    primary key (source, channel, name)
);
comment on table ingest_cursors is
    'Where a job goes on; written in the transaction of the rows that it speaks of.';

-- The weight budget: one gate row and some sixty buckets per egress key.
create table rate_budget (
    egress_key    text primary key,
    blocked_until timestamptz not null default '-infinity',
    strikes       integer not null default 0,
    paced_until   timestamptz not null default '-infinity',
    urgent_at     timestamptz not null default '-infinity'
);
comment on column rate_budget.blocked_until is 'no process may send before this: the server answered 429';
comment on column rate_budget.strikes is 'how many 429 in a row';
comment on column rate_budget.paced_until is 'up to when the evenly spread share of paced callers is spent';
comment on column rate_budget.urgent_at is 'when an urgent caller last asked';

create table rate_budget_buckets (
    egress_key    text not null,
    second        bigint not null,
    weight        bigint not null default 0,
    urgent_weight bigint not null default 0,
    requests      bigint not null default 0,
    primary key (egress_key, second)
);
comment on table rate_budget_buckets is
    'Weight per second of the last minute; a request counts from its reservation, then from its answer.';

create table rate_budget_waiters (
    egress_key    text not null,
    waiter        uuid not null,
    priority      integer not null,
    weight        bigint not null,
    since         timestamptz not null,
    expires_at    timestamptz not null,
    primary key (egress_key, waiter)
);
comment on table rate_budget_waiters is 'Who waits for weight: served by priority, then by order of arrival.';

-- Ask for weight. Returns (0, second) when granted: the weight stands in the bucket of that second until
-- budget_settle() moves it. Otherwise (seconds to wait, null): ask again then, with the same waiter id.
--
-- Priorities: 0 urgent (a minute's snapshot), 1 normal, 2 bulk (backfill).
--   * Within the window of 60 s plus `margin_s` no more than `weight_limit` is ever granted.
--   * Who waits longer within a priority, or has a higher one, is served first: nobody overtakes a waiter
--     unless there is room for both, so dear requests do not starve beside cheap ones.
--   * Bulk callers, and normal ones while urgent callers are about, are paced evenly over the minute, so that
--     some weight comes free every second; a small reserve only urgent callers may touch covers the rest.
create function budget_reserve(
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
    wait        double precision := 0;
    credit_s    constant double precision := 3;
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
    paced := rank >= 2 or (rank = 1 and gate.urgent_at > to_timestamp(now_s - 600));
    if paced then
        ceiling := weight_limit - greatest(weight_limit / 50, 2);
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
comment on function budget_reserve is 'Ask for API weight; see sql/0001_foundation.sql.';

-- Tell what a granted request really cost, now that its answer is here: the weight moves to the present second,
-- because the server charged it at some moment up to now, and what was reserved too much is given back.
-- `refused_s`: the server said 429 and this is how long it asked to wait (0: it did not say).
create function budget_settle(
    key text, granted_second bigint, reserved bigint, cost bigint, rank integer,
    refused_s double precision, weight_limit bigint
) returns void
language plpgsql as $$
declare
    strikes_now integer;
begin
    select strikes into strikes_now from rate_budget where egress_key = key for update;
    update rate_budget_buckets b
        set weight = greatest(b.weight - reserved, 0),
            urgent_weight = greatest(b.urgent_weight - case when rank = 0 then reserved else 0 end, 0),
            requests = greatest(b.requests - 1, 0)
        where b.egress_key = key and b.second = granted_second;
    insert into rate_budget_buckets as b (egress_key, second, weight, urgent_weight, requests)
        values (key, floor(extract(epoch from clock_timestamp()))::bigint, cost,
                case when rank = 0 then cost else 0 end, 1)
        on conflict (egress_key, second) do update
            set weight = b.weight + excluded.weight, urgent_weight = b.urgent_weight + excluded.urgent_weight,
                requests = b.requests + 1;
    if refused_s is not null then
        update rate_budget
            set strikes = strikes + 1,
                blocked_until = greatest(blocked_until, clock_timestamp() + make_interval(secs =>
                    case when refused_s > 0 then refused_s else least(60, 10 * 2 ^ least(strikes_now, 3)) end))
            where egress_key = key;
    else
        if strikes_now > 0 then
            update rate_budget set strikes = 0 where egress_key = key;
        end if;
        if reserved > cost and rank > 0 then
            update rate_budget
                set paced_until = paced_until - make_interval(secs => (reserved - cost) * 60.0 / weight_limit)
                where egress_key = key;
        end if;
    end if;
end
$$;
comment on function budget_settle is 'Replace a reservation by its real cost; see sql/0001_foundation.sql.';
