-- name: begin
insert into ingestion_runs (run_id, source, channel, status, member, lock_key, host, pid, version)
values (%s, %s, %s, 'running', %s, %s, %s, %s, %s) returning started_at

-- name: skip
insert into ingestion_runs (run_id, source, channel, status, member, finished_at, exit_code, error, host, pid, version)
values (%s, %s, %s, 'skipped', %s, clock_timestamp(), %s, 'another run holds the lock', %s, %s, %s)

-- A run lives as long as its lock is held, and none of those here is the caller's.
-- name: abandon
update ingestion_runs set status = 'abandoned', finished_at = clock_timestamp(),
    error = 'found dead by a later run'
where status = 'running' and run_id in (
    select r.run_id from ingestion_runs r
    left join pg_locks l on l.locktype = 'advisory' and l.classid = %s and l.objid = r.lock_key and l.objsubid = 2
        and l.granted and l.pid <> pg_backend_pid()
        and l.database = (select oid from pg_database where datname = current_database())
    where r.source = %s and r.channel = %s and r.status = 'running' and l.pid is null)

-- name: heard
update ingestion_runs set heard_at = clock_timestamp() where run_id = %s and status = 'running'

-- name: add
update ingestion_runs set units_ok = units_ok + %(units_ok)s, units_failed = units_failed + %(units_failed)s,
    rows_served = rows_served + %(served)s, rows_inserted = rows_inserted + %(inserted)s,
    rows_updated = rows_updated + %(updated)s, rows_unchanged = rows_unchanged + %(unchanged)s,
    rows_duplicate = rows_duplicate + %(duplicate)s, rows_rejected = rows_rejected + %(rejected)s,
    rows_failed = rows_failed + %(failed)s, requests = %(requests)s, weight = %(weight)s,
    heard_at = clock_timestamp()
where run_id = %(run_id)s and status = 'running'
returning run_id

-- name: finish
update ingestion_runs set status = %(status)s, exit_code = %(exit_code)s, error = %(error)s,
    finished_at = clock_timestamp(), requests = %(requests)s, weight = %(weight)s,
    details = details || %(details)s::jsonb
where run_id = %(run_id)s and status = 'running'

-- name: keep_cursor
insert into ingest_cursors as stored (source, channel, name, value, updated_at) values (%s, %s, %s, %s, %s)
on conflict (source, channel, name) do update set value = excluded.value, updated_at = excluded.updated_at
    where stored.value is distinct from excluded.value

-- name: cursor
select value from ingest_cursors where source = %s and channel = %s and name = %s

-- The last runs of a channel in one row; a running row whose lock nobody holds is a dead run.
-- name: health
select
    (select to_jsonb(r) from ingestion_runs r where r.source = %(source)s and r.channel = %(channel)s
        and r.status <> 'skipped' and (r.status <> 'running' or not %(locked)s)
        order by r.started_at desc limit 1) as last_run,
    (select max(r.finished_at) from ingestion_runs r where r.source = %(source)s and r.channel = %(channel)s
        and r.status in ('ok', 'partial')) as last_success,
    (select to_jsonb(r) from ingestion_runs r where r.source = %(source)s and r.channel = %(channel)s
        and r.status = 'running' and %(locked)s
        order by coalesce(r.heard_at, r.started_at) desc limit 1) as current_run,
    (select count(*) from ingestion_runs r where r.source = %(source)s and r.channel = %(channel)s
        and r.status = 'skipped' and r.started_at > coalesce((select max(d.started_at) from ingestion_runs d
            where d.source = %(source)s and d.channel = %(channel)s and d.status not in ('skipped', 'running')),
            '-infinity')) as skips,
    clock_timestamp() as now

-- name: lock_held
select exists (select from pg_locks where locktype = 'advisory' and classid = %s and objid = %s and objsubid = 2
    and database = (select oid from pg_database where datname = current_database()) and granted)

-- name: budget
select g.egress_key,
       coalesce(sum(b.weight) filter (where b.second > extract(epoch from clock_timestamp()) - 60), 0)::bigint,
       coalesce(sum(b.requests) filter (where b.second > extract(epoch from clock_timestamp()) - 60), 0)::bigint,
       case when g.blocked_until > clock_timestamp() then g.blocked_until end
from rate_budget g left join rate_budget_buckets b on b.egress_key = g.egress_key
group by g.egress_key, g.blocked_until order by g.egress_key
