-- What the HTTP API answers, as JSON text: the rows' text need not pass through Python's objects.
-- A list is `with found as (one of event, created, active) page`. Each of the three tells the latest row of every TWAP
-- of a wallet that matches. What ended a TWAP is later than what began it, whatever their times say: some files know only
-- when it was created.

-- The latest of the rows between start and end.
-- name: event
select distinct on (twap_id) twap_id, ts, status
from twap_status
where wallet = %(wallet)s and ts between %(start)s and %(end)s and (%(asset)s::text is null or asset = %(asset)s)
order by twap_id, status <> 'activated' desc, ts desc, status

-- name: created
select distinct on (twap_id) twap_id, ts, status
from twap_status
where wallet = %(wallet)s and twap_id in (
    select twap_id from twap_status
    where wallet = %(wallet)s and created_at between %(start)s and %(end)s
      and (%(asset)s::text is null or asset = %(asset)s))
order by twap_id, status <> 'activated' desc, ts desc, status

-- Alive from its creation to its end; while the end is unknown, for the time that it was to take. A ts of kind creation
-- says nothing of the end.
-- name: active
select distinct on (twap_id) twap_id, ts, status
from twap_status
where wallet = %(wallet)s and twap_id in (
    select twap_id from twap_status
    where wallet = %(wallet)s and twap_id in (
        -- A TWAP runs for a day at most: of an old wallet's thousands only a few can be meant. What says when it was
        -- created may be either of the two times.
        select twap_id from twap_status
        where wallet = %(wallet)s and ts between %(start)s - interval '31 days' and %(end)s + interval '31 days'
        union all
        select twap_id from twap_status
        where wallet = %(wallet)s and created_at between %(start)s - interval '31 days' and %(end)s)
    group by twap_id
    having min(coalesce(created_at, ts)) <= %(end)s
       and coalesce(min(ts) filter (where status <> 'activated' and ts_kind <> 'creation'),
                    greatest(max(ts), min(created_at) + max(duration_minutes) * interval '1 minute')) >= %(start)s
       and (%(asset)s::text is null or bool_or(asset = %(asset)s)))
order by twap_id, status <> 'activated' desc, ts desc, status

-- name: page
select coalesce(json_agg(json_build_object(
    'twap_id', twap_id::text,
    'asset', asset,
    'side', side,
    'status', s.status,
    'duration_minutes', duration_minutes,
    'latest_ts', to_char(s.ts, case when s.ts = date_trunc('second', s.ts) then 'YYYY-MM-DD"T"HH24:MI:SS"Z"'
                                      else 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"' end),
    'executed', json_build_object('size', size_executed::text, 'notional', notional_executed::text),
    'raw', raw_payload
    ) order by latest.ts desc, twap_id desc, s.ts desc, s.status <> 'activated' desc, s.status), '[]')::text
from (select twap_id, ts, status from found order by ts desc, twap_id desc limit %(limit)s) latest
join twap_status s using (twap_id)
where wallet = %(wallet)s
  and case when %(latest_per_twap)s then s.ts = latest.ts and s.status = latest.status
           when %(by)s = 'event' then s.ts between %(start)s and %(end)s
                                      and (%(asset)s::text is null or asset = %(asset)s)
           else true end

-- name: twap
select json_agg(json_build_object(
    'wallet', wallet,
    'ts', to_char(ts, case when ts = date_trunc('second', ts) then 'YYYY-MM-DD"T"HH24:MI:SS"Z"'
                           else 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"' end),
    'status', status,
    'raw', raw_payload
    ) order by ts, status <> 'activated', status, wallet)::text
from twap_status
where twap_id = %(twap_id)s

-- Of a file of this machine only the name: whoever asks need not know its folders.
-- name: last_ingested
select s3_object_key, last_modified, ingested_at, rows_ingested
from (select case when bucket = 'file:' then regexp_replace(s3_object_key, '^.*/', '') else s3_object_key end,
             last_modified, ingested_at, rows_ingested
      from etl_s3_ingest_log where table_name = 'twap_status' and state = 'ok'
      order by ingested_at desc limit 1) newest (s3_object_key, last_modified, ingested_at, rows_ingested)
