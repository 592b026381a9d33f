-- name: rules
select table_name from retention_rules order by table_name

-- One rule and its table as the catalog knows it. Times are text: a cut-off may lie before the year 1.
-- name: rule
select r.table_name as name, n.nspname as schema, c.relname as table, r.time_column as column,
       (hlcli_now() - r.keep)::text as cut_off,
       c.oid, m.nspname as default_schema, d.relname as default_table,
       array(select f.attname::text from pg_attribute f
             where f.attrelid = c.oid and f.attnum > 0 and not f.attisdropped and f.attgenerated = ''
             order by f.attnum) as columns,
       r.partition_span is not null as partitioned,
       case c.oid when to_regclass('ingestion_runs') then 'expendable_runs'
                  when to_regclass('wallet_universe_members') then 'expendable_members' end as expendable,
       case when c.oid is null then 'there is no such table'
            when c.relkind not in ('r', 'p') then 'this is no table'
            when a.attnum is null then format('there is no column %%I', r.time_column)
            when a.atttypid <> 'timestamptz'::regtype then format('column %%I is no timestamptz', r.time_column)
            when r.partition_span is null and c.relkind = 'p'
                then 'the table is partitioned, its rule needs a partition_span'
            when r.partition_span is not null and (p.partstrat = 'r' and p.partnatts = 1
                    and p.partattrs[0] = a.attnum) is not true
                then format('partition_span is set, but the table is not partitioned by range of %%I', r.time_column)
       end as unfit
from retention_rules r
left join pg_class c on c.oid = to_regclass(r.table_name)
left join pg_namespace n on n.oid = c.relnamespace
left join pg_attribute a on a.attrelid = c.oid and a.attname = r.time_column and a.attnum > 0 and not a.attisdropped
left join pg_partitioned_table p on p.partrelid = c.oid
left join pg_class d on d.oid = p.partdefid
left join pg_namespace m on m.oid = d.relnamespace
where r.table_name = %(name)s

-- The partitions of a table, but not its default one. MINVALUE and MAXVALUE stand without quotes: no bound.
-- name: partitions
select n.nspname as schema, c.relname as name,
       tstzrange(substring(b.bounds from 'FROM \(''([^'']*)''\)')::timestamptz,
                 substring(b.bounds from 'TO \(''([^'']*)''\)')::timestamptz) as span
from pg_inherits i
join pg_class c on c.oid = i.inhrelid
join pg_namespace n on n.oid = c.relnamespace
cross join lateral (select pg_get_expr(c.relpartbound, c.oid)) b (bounds)
where i.inhparent = %(oid)s and b.bounds <> 'DEFAULT'

-- The spans between two moments, by default from now to the near future, that existing partitions do not cover.
-- name: missing
with taken as (
    select coalesce(range_agg(partition.span), '{{}}') as spans from ({partitions}
    ) partition
), clock as materialized (
    select hlcli_now() as now
), span as (
    select r.partition_span as length, lower
    from retention_rules r, clock,
         generate_series(date_bin(r.partition_span, coalesce(%(first)s, clock.now), 'epoch'),
                         coalesce(%(last)s, clock.now + %(ahead)s * r.partition_span), r.partition_span) lower
    where r.table_name = %(name)s
)
select %(table)s || to_char(span.lower, case when mod(extract(epoch from span.length), 86400) = 0
                                             then '"_p"YYYYMMDD' else '"_p"YYYYMMDD_HH24MI' end) as name,
       span.lower::text, (span.lower + span.length)::text as upper,
       taken.spans && tstzrange(span.lower, span.lower + span.length) as overlaps
from span, taken
where not taken.spans @> tstzrange(span.lower, span.lower + span.length)
order by span.lower

-- The spans that rows in the default partition belong to.
-- name: astray
select distinct date_bin(r.partition_span, astray.{column}, 'epoch') as lower
from {default} astray, retention_rules r where r.table_name = {name}
order by lower limit {most}

-- name: outlived
select partition.schema, partition.name from ({partitions}
) partition
where upper(partition.span) <= %(cut_off)s::timestamptz
order by upper(partition.span)

-- Who has this lock waits for nobody, and nobody who came through the table holds one of its partitions. A weaker
-- lock would let a writer choose the default partition, wait for it, and be refused once the new one is attached.
-- name: lock
lock table only {table} in access exclusive mode

-- Indexes come with attaching: built at once they cost less than row by row.
-- name: create
create table {partition} (like {table} including all excluding identity excluding indexes)

-- name: move
with moved as (
    delete from {default} where {column} >= {lower} and {column} < {upper} returning {columns}
)
insert into {partition} ({columns}) select {columns} from moved

-- name: attach
alter table {table} attach partition {partition} for values from ({lower}) to ({upper})

-- name: drop
drop table {partition}

-- name: count_old
select count(*) from {table} old where old.{column} < {cut_off}::timestamptz and {expendable}

-- The age is asked twice, as a row may be changed after it was chosen.
-- name: delete_old
delete from {table} where {column} < {cut_off}::timestamptz and ctid = any (array(
    select old.ctid from {table} old
    where old.{column} < {cut_off}::timestamptz and {expendable}
    limit {batch}))

-- Which runs the ledger can do without: not one under way, nor a channel's last one or its last success.
-- name: expendable_runs
(old.status = 'skipped' or old.status <> 'running'
    and exists (select from ingestion_runs later
        where later.source = old.source and later.channel = old.channel and later.started_at > old.started_at
          and later.status <> 'skipped')
    and (old.status not in ('ok', 'partial') or exists (select from ingestion_runs later
        where later.source = old.source and later.channel = old.channel and later.started_at > old.started_at
          and later.status in ('ok', 'partial'))))

-- Not the universe that is watched, however long ago it was found.
-- name: expendable_members
old.run_id < (select max(success.run_id) from wallet_universe_runs success where success.status = 'success')
