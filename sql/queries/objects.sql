-- name: known
select s3_object_key, etag, size, state from etl_s3_ingest_log where table_name = %s and bucket = %s

-- name: stored
select object_id, loaded_version, first_time, last_time from etl_s3_ingest_log
where (table_name, bucket, s3_object_key) = (%(table_name)s, %(bucket)s, %(s3_object_key)s) for update

-- Whoever reads an object holds its row until the object's rows are committed.
-- name: begin
insert into etl_s3_ingest_log (table_name, bucket, s3_object_key, etag, size, last_modified, state, attempts, run_id)
values (%(table_name)s, %(bucket)s, %(s3_object_key)s, %(etag)s, %(size)s, %(last_modified)s, 'pending', 0, %(run_id)s)
on conflict do nothing

-- name: loaded
update etl_s3_ingest_log log
set attempts = case when (log.etag, log.size) = (%(etag)s, %(size)s) then log.attempts + 1 else 1 end,
    etag = %(etag)s, size = %(size)s, last_modified = %(last_modified)s, loaded_version = %(version)s,
    state = 'ok', error_text = null, rows_read = %(read)s, rows_ingested = %(ingested)s,
    rows_inserted = %(inserted)s, rows_rejected = %(rejected)s, first_time = %(first)s, last_time = %(last)s,
    run_id = %(run_id)s, ingested_at = clock_timestamp()
where log.object_id = %(object_id)s

-- The numbers stay those of the version whose rows are in the table. What cannot be read is given up after `attempts`
-- times, or at once when it is final. What cannot be fetched never is, and was not read (attempts NULL).
-- name: failed
insert into etl_s3_ingest_log as log
    (table_name, bucket, s3_object_key, etag, size, last_modified, state, error_text, attempts, run_id)
values (%(table_name)s, %(bucket)s, %(s3_object_key)s, %(etag)s, %(size)s, %(last_modified)s,
        case when %(final)s then 'quarantined' else 'failed' end, %(error)s,
        num_nonnulls(%(attempts)s::integer), %(run_id)s)
on conflict (table_name, bucket, s3_object_key) do update
    set attempts = excluded.attempts
                   + case when (log.etag, log.size) = (excluded.etag, excluded.size) then log.attempts else 0 end,
        state = case when (log.etag, log.size) = (excluded.etag, excluded.size) and log.attempts + 1 >= %(attempts)s::integer
                     then 'quarantined' else excluded.state end,
        etag = excluded.etag, size = excluded.size, last_modified = excluded.last_modified,
        error_text = excluded.error_text, run_id = excluded.run_id, ingested_at = clock_timestamp()

-- name: remove_rows
delete from {table} where object_id = {object_id} and {time} between {first} and {last}

-- Objects that served rows of the same time, some of which may have been taken for the removed object's: read them
-- again. Where neither found a row of the other's, there was none.
-- name: read_again
update etl_s3_ingest_log other set state = 'pending'
from etl_s3_ingest_log log
where log.object_id = %(object_id)s and other.table_name = log.table_name and other.object_id <> log.object_id
  and other.state = 'ok' and other.first_time <= log.last_time and other.last_time >= log.first_time
  and (other.rows_inserted < other.rows_read - other.rows_rejected
       or log.rows_inserted < log.rows_read - log.rows_rejected)
returning other.s3_object_key, other.bucket

-- name: first_reason
select concat_ws(' ', column_name, reason) from rejected_rows 
where table_name = %(table_name)s and last_run_id = %(run_id)s
  and (payload ~ %(row)s or starts_with(row_key, %(place)s))
order by last_seen_at limit 1
