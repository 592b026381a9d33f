-- What the objects in S3 cover. A key that tells an hour ends in 20250727/8.lz4 or in 2025/07/27/08/part.parquet; what
-- stands before that is the series: several have been published, of which each is cut into hours by itself. An hour is
-- there when all of its objects are in the table, and covered when the next one is there, too: objects are cut by
-- arrival, so the first lines of the next one belong to it. `otherwise` is what is wanted of a wallet that was never
-- asked for: all that is not newer than S3. `of_wanted`: what lies where anything is wanted of the others, which is
-- little, as the API is asked for what is older; with all of a log full of gaps each wallet would cost 0.1 ms.
-- name: s3
with known as materialized (
    select bucket = 'file:' as local, bucket, state, rows_ingested, rows_rejected, s3_object_key,
           coalesce(regexp_match(s3_object_key, '^(|.*/)(20[0-9]{2})([0-9]{2})([0-9]{2})/([0-9]{1,2})(?:\.[A-Za-z]\w*)+$'),
                    regexp_match(s3_object_key, '^(|.*/)(20[0-9]{2})/([0-9]{2})/([0-9]{2})/([0-9]{2})/[^/]+$')) as part
    from etl_s3_ingest_log where table_name = 'fills'
), told as (
    -- A day or an hour that does not exist overflows into another one, and is told by that.
    select *, make_timestamp(part[2]::integer, 1, 1, 0, 0, 0) + make_interval(
        months => part[3]::integer - 1, days => part[4]::integer - 1, hours => part[5]::integer) as hour
    from known
), checked as (
    select *, case when not local and to_char(hour, 'MMDDHH24') = part[3] || part[4] || lpad(part[5], 2, '0')
                   then hour at time zone 'UTC' end as checked_hour
    from told
), hours as (
    select bucket, part[1] as series, length(s3_object_key) - length(replace(s3_object_key, '/', '')) as depth,
           checked_hour as hour
    from checked where checked_hour is not null group by 1, 2, 3, 4 having bool_and(state = 'ok')
), followed as (
    select hour, lead(hour) over (partition by bucket, series, depth order by hour) = hour + interval '1 hour' as whole
    from hours
), covered as (
    select coalesce(range_agg(tstzrange(hour, hour + interval '1 hour')), '{}') as s3 from followed
    -- Amid these the exchange's nodes began to write files of fills, and files of fills by block.
    where whole and hour not in ('2025-05-25 14:00+00', '2025-07-27 08:00+00')
), counted as (
    select count(*) filter (where not local) as objects,
           count(*) filter (where not local and state = 'ok') as objects_ok,
           count(*) filter (where not local and checked_hour is null) as objects_without_hour,
           coalesce(sum(rows_ingested) filter (where not local), 0)::text as rows_ingested,
           coalesce(sum(rows_rejected) filter (where not local), 0)::text as rows_rejected,
           count(*) filter (where local) as files,
           coalesce(sum(rows_ingested) filter (where local), 0)::text as rows_of_files
    from checked
)
select s3::text, (tstzmultirange(range_merge(s3)) - s3)::text,
       tstzmultirange(tstzrange(%(launch)s, greatest(%(launch)s, coalesce(
           upper(s3), date_trunc('second', hlcli_now())))))::text,
       (select s3 * tstzmultirange(tstzrange(min(wanted_from), max(wanted_to))) from backfill_progress)::text as of_wanted,
       counted.*
from covered, counted

-- Missing is what is wanted, but neither served by the API nor in S3, be it still to be asked or cut off.
-- name: by_state
select state, count(*), sum(fills_count)::text, count(*) filter (where not isempty(cut_off)),
       count(*) filter (where not %(s3)s::tstzmultirange
                                  @> (tstzmultirange(tstzrange(wanted_from, wanted_to)) - covered))
from backfill_progress group by state

-- {wallets} is one of the two below. What is missing or failed comes first.
-- name: wallets
select user_address, state, wanted::text, covered::text, cut_off::text, slices_covered::text,
       (wanted - covered - %(s3)s::tstzmultirange)::text as missing,
       fills_count, pages, attempts, oldest_fill_time, completed_at::text, error
from (
    select *, case when state = 'failed' then 0
                   when %(s3)s::tstzmultirange @> (wanted - covered) then case when isempty(cut_off) then 4 else 3 end
                   when isempty(cut_off) then 2 else 1 end as rank
    from {wallets} wallet where %(state)s::text is null or state = %(state)s
    order by rank, user_address limit %(limit)s
) chosen

-- name: of_all
(select *, tstzmultirange(tstzrange(wanted_from, wanted_to)) as wanted from backfill_progress)

-- name: of_users
(select user_address, state, coalesce(covered, '{}') as covered, coalesce(cut_off, '{}') as cut_off,
        coalesce(slices_covered, '{}') as slices_covered,
        case when state is null then %(otherwise)s::tstzmultirange
             else tstzmultirange(tstzrange(wanted_from, wanted_to)) end as wanted,
        coalesce(fills_count, 0) as fills_count, coalesce(pages, 0) as pages, coalesce(attempts, 0) as attempts,
        oldest_fill_time, completed_at, error
 from unnest(%(users)s::text[]) named (user_address) left join backfill_progress using (user_address))

-- name: stored
select user_address, source, count(*), min(time)::text, max(time)::text
from fills where user_address = any (%(users)s) group by 1, 2 order by 1, 2
