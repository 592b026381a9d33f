-- name: last_universe
select n_requested, n_listed, source, churn_warning_count from wallet_universe_runs
where status = 'success' order by run_id desc limit 1

-- name: universe
select wallet_id from wallet_universe_current

-- name: begin_universe_run
insert into wallet_universe_runs (as_of_ts, status, source, n_requested, n_received, n_listed, entered_count,
    exited_count, churn_warning_count, duration_ms, error, ledger_run_id)
values (%(as_of_ts)s, %(status)s, %(source)s, %(n_requested)s, %(n_received)s, %(n_listed)s, %(entered_count)s,
    %(exited_count)s, %(churn_warning_count)s,
    (extract(epoch from clock_timestamp() - %(as_of_ts)s) * 1000)::integer, %(error)s, %(ledger_run_id)s)
returning run_id

-- name: drop_exited
delete from wallet_universe_current where not wallet_id = any (%s)

-- name: keep_members
insert into wallet_universe_members (run_id, wallet_id, rank, month_pnl, month_roi, account_value, display_name, as_of_ts)
select %s, wallet_id, rank, month_pnl, month_roi, account_value, display_name, as_of_ts from wallet_universe_current

-- name: universe_run
select run_id, as_of_ts, status, source, n_requested, n_received, n_listed, entered_count, exited_count,
       churn_warning_count, duration_ms, error
from wallet_universe_runs
where case when %(run_id)s::bigint is null then status = 'success' else run_id = %(run_id)s end
order by run_id desc limit 1

-- name: members
select rank, wallet_id, month_pnl, month_roi, account_value, display_name
from wallet_universe_members where run_id = %s order by rank

-- What changed since the success before this run: entered, exited, or moved to another rank.
-- name: diff
with before as (
    select m.* from wallet_universe_members m where m.run_id = (
        select max(r.run_id) from wallet_universe_runs r where r.status = 'success' and r.run_id < %(run_id)s)
), after as (
    select m.* from wallet_universe_members m where m.run_id = %(run_id)s
)
select case when before.wallet_id is null then 'entered' when after.wallet_id is null then 'exited' else 'moved' end,
       wallet_id, before.rank, after.rank, coalesce(after.month_pnl, before.month_pnl),
       coalesce(after.display_name, before.display_name)
from before full join after using (wallet_id)
where before.rank is distinct from after.rank
order by 1, after.rank, before.rank

-- name: minute
select date_trunc('minute', now), extract(epoch from now - date_trunc('minute', now))::float8 from hlcli_now() now

-- Wallets and the assets of which this minute has no known position yet, the best wallets first.
-- name: lacking
select u.wallet_id, array_agg(a.asset order by a.place)
from wallet_universe_current u
cross join unnest(%(assets)s::text[]) with ordinality a (asset, place)
where not exists (select from wallet_snapshots s where s.snapshot_ts = %(minute)s and s.wallet_id = u.wallet_id
                  and s.asset = a.asset and s.position_szi is not null)
group by u.wallet_id, u.rank order by u.rank

-- The row is filled in by close_minute, in the same transaction.
-- name: open_minute
insert into ingest_runs as r (snapshot_ts, status, wallets_expected, wallets_succeeded, wallets_failed, rows_expected,
    rows_written, coverage_pct, duration_ms, ledger_run_id)
values (%(minute)s, 'failed', 0, 0, 0, 0, 0, 0, 0, %(ledger_run_id)s)
on conflict (snapshot_ts) do update set ledger_run_id = excluded.ledger_run_id
returning run_id

-- Runs are judged here and nowhere else: success from 95 %% of the wallets, partial from 80 %%, else failed.
-- name: close_minute
with wallet as (
    select count(*) as expected, count(s.position_szi) as known from wallet_snapshots s
    where s.snapshot_ts = %(minute)s group by s.wallet_id
), total as (
    select count(*) as wallets, count(*) filter (where known = expected) as succeeded,
           sum(expected) as rows_expected, sum(known) as rows_written,
           round(100.0 * count(*) filter (where known = expected) / greatest(count(*), 1), 2) as coverage_pct
    from wallet
)
update ingest_runs r set
    status = case when t.succeeded * 100 >= t.wallets * 95 then 'success'
                  when t.succeeded * 100 >= t.wallets * 80 then 'partial' else 'failed' end,
    wallets_expected = t.wallets, wallets_succeeded = t.succeeded, wallets_failed = t.wallets - t.succeeded,
    rows_expected = t.rows_expected, rows_written = t.rows_written, coverage_pct = t.coverage_pct,
    duration_ms = %(duration_ms)s, error = %(error)s
from total t where r.snapshot_ts = %(minute)s
returning r.status, r.wallets_expected, r.wallets_failed, r.coverage_pct

-- A position that is gone for one minute, or twentyfold for one minute, is an error of the source, and known to be
-- one only a minute later. A minute that failed as a whole says nothing of its wallets. Returns how many rows of the
-- minute before were found so.
-- name: mark_implausible
with odd as (
    select t1.snapshot_ts, t1.wallet_id, t1.asset, t0.position_szi as before, t1.position_szi as found,
           t2.position_szi as after,
           case when (t1.position_szi is null or abs(t1.position_szi) < 0.01 * abs(t0.position_szi))
                     and abs(t2.position_szi) > 0.5 * abs(t0.position_szi) then 'transient_collapse'
                when abs(t2.position_szi) > e.eps
                     and abs(t1.position_szi) > 20 * greatest(abs(t0.position_szi), abs(t2.position_szi))
                then 'szi_jump' end as reason
    from wallet_snapshots t2
    join wallet_snapshots t1 on t1.wallet_id = t2.wallet_id and t1.asset = t2.asset
         and t1.snapshot_ts = %(minute)s::timestamptz - interval '1 minute'
    join wallet_snapshots t0 on t0.wallet_id = t2.wallet_id and t0.asset = t2.asset
         and t0.snapshot_ts = %(minute)s::timestamptz - interval '2 minutes'
    join ingest_runs r1 on r1.snapshot_ts = t1.snapshot_ts and r1.status <> 'failed'
    cross join lateral (
        select coalesce((%(eps)s::jsonb ->> t2.asset)::numeric, 0) as eps
    ) e
    where t2.snapshot_ts = %(minute)s and abs(t0.position_szi) > e.eps
), marked as (
    update wallet_snapshots s set is_dirty = true, dirty_reason = odd.reason
    from odd where odd.reason is not null and s.snapshot_ts = odd.snapshot_ts and s.wallet_id = odd.wallet_id
        and s.asset = odd.asset and s.dirty_reason is distinct from odd.reason
    returning s.wallet_id
), told as (
    insert into snapshot_anomalies (snapshot_ts, wallet_id, asset, anomaly_type, details, detected_at)
    select snapshot_ts, wallet_id, asset, reason,
           jsonb_build_object('before', before, 'found', found, 'after', after), hlcli_now()
    from odd where reason is not null
    on conflict (snapshot_ts, wallet_id, asset, anomaly_type) do nothing
)
select count(*) from marked

-- What a second run in the minute has learnt is no anomaly any more.
-- name: tell_nulls
with learnt as (
    delete from snapshot_anomalies a using wallet_snapshots s
    where a.snapshot_ts = %(minute)s and a.anomaly_type = 'null_szi' and s.snapshot_ts = a.snapshot_ts
        and s.wallet_id = a.wallet_id and s.asset = a.asset and s.position_szi is not null
)
insert into snapshot_anomalies (snapshot_ts, wallet_id, asset, anomaly_type, details, detected_at)
select snapshot_ts, wallet_id, asset, 'null_szi', jsonb_build_object('reason', missing_reason), hlcli_now()
from wallet_snapshots where snapshot_ts = %(minute)s and position_szi is null
on conflict (snapshot_ts, wallet_id, asset, anomaly_type) do nothing

-- name: keep_health
insert into ingest_health (health_ts, last_success_snapshot_ts, snapshot_status, coverage_pct, health_state, error)
select %(minute)s, last_success_snapshot_ts, snapshot_status, coverage_pct, health_state, error
from v_latest_health where last_snapshot_ts is not null
on conflict (health_ts) do update set last_success_snapshot_ts = excluded.last_success_snapshot_ts,
    snapshot_status = excluded.snapshot_status, coverage_pct = excluded.coverage_pct,
    health_state = excluded.health_state, error = excluded.error

-- name: health
select health_state, coverage_pct, last_snapshot_ts, last_success_snapshot_ts, snapshot_status, age_s, error
from v_latest_health where last_snapshot_ts is not null
