-- What comes in files: the log of objects, TWAP statuses and fills.

alter table retention_rules alter column keep drop not null;
comment on column retention_rules.keep is
    'rows are removed when time_column is older than this; of a partitioned table whole partitions, so up to one later; NULL: never';

create table etl_s3_ingest_log (
    object_id      bigint generated always as identity unique,
    table_name     text collate "C" not null,
    bucket         text collate "C" not null,
    s3_object_key  text collate "C" not null,
    etag           text not null,
    size           bigint not null,
    last_modified  timestamptz not null,
    state          text not null,
    attempts       integer not null default 1,
    rows_read      bigint not null default 0,
    rows_ingested  bigint not null default 0,
    rows_inserted  bigint not null default 0,
    rows_rejected  bigint not null default 0,
    first_time     timestamptz,
    last_time      timestamptz,
    loaded_version text,
    error_text     text,
    run_id         uuid not null,
    ingested_at    timestamptz not null default clock_timestamp(),
    primary key (table_name, bucket, s3_object_key),
    constraint etl_s3_ingest_log_state check (state in ('pending', 'ok', 'failed', 'quarantined')),
    constraint etl_s3_ingest_log_error check ((error_text is not null) = (state in ('failed', 'quarantined')))
);
comment on table etl_s3_ingest_log is
    'One row an object and table it was read for. Skipped is what is ok, or quarantined, with the same ETag and size.';
comment on column etl_s3_ingest_log.bucket is 'of a file of this machine "file:", with its whole path as the key';
comment on column etl_s3_ingest_log.etag is 'of the version that the row speaks of; of a file its size and time of change';
comment on column etl_s3_ingest_log.state is
    'ok: its rows are in the table; failed: read again by the next run; quarantined: not before it is replaced; pending: to be read again';
comment on column etl_s3_ingest_log.attempts is 'how often this version was read';
comment on column etl_s3_ingest_log.rows_read is 'rows_ingested + rows_rejected + those that were stored already or stand in it twice';
comment on column etl_s3_ingest_log.rows_ingested is 'inserted or updated';
comment on column etl_s3_ingest_log.rows_inserted is 'of rows_ingested those that were new to the table';
comment on column etl_s3_ingest_log.loaded_version is 'ETag and size of the version whose rows are in the table, to which the numbers belong';
comment on column etl_s3_ingest_log.rows_rejected is 'in table rejected_rows';
comment on column etl_s3_ingest_log.first_time is 'time of its earliest row, as last_time is of its latest';
comment on column etl_s3_ingest_log.ingested_at is 'when state last changed';

create table twap_status (
    twap_id           bigint not null,
    wallet            text collate "C" not null,
    ts                timestamptz not null,
    status            text collate "C" not null,
    asset             text collate "C",
    side              text collate "C",
    size_requested    numeric,
    size_executed     numeric,
    notional_executed numeric,
    duration_minutes  integer,
    status_error      text,
    created_at        timestamptz,
    ts_kind           text not null,
    event_time_ns     bigint,
    block_number      bigint,
    reduce_only       boolean,
    randomize         boolean,
    is_exact          boolean not null default true,
    s3_object_key     text not null,
    s3_last_modified  timestamptz not null,
    object_id         bigint not null,
    raw_payload       jsonb not null,
    inserted_at       timestamptz not null default clock_timestamp(),
    primary key (twap_id, wallet, ts, status),
    constraint twap_status_wallet check (wallet ~ '^0x[0-9a-f]{40}$'),
    constraint twap_status_times check (ts >= '2023-01-01 00:00:00+00' and ts < '2100-01-01 00:00:00+00'),
    constraint twap_status_kind check (ts_kind in ('event', 'block', 'creation'))
);
create index twap_status_wallet_ts_idx on twap_status (wallet, ts);
create index twap_status_wallet_created_idx on twap_status (wallet, created_at);
-- What a replaced object brought is removed; its rows lie together.
create index twap_status_object_idx on twap_status using brin (object_id);
comment on table twap_status is
    'One row an event of a TWAP order: activated, then finished, terminated or error. (twap_id, ...) of the key serves as an index.';
comment on column twap_status.ts is 'when it happened, cut to microseconds; see ts_kind';
comment on column twap_status.ts_kind is
    'where ts is from: event, or, in files without it, block; or creation, the same for all rows of a TWAP';
comment on column twap_status.event_time_ns is 'ts in nanoseconds since 1970, as served; NULL for ts_kind creation';
comment on column twap_status.created_at is 'when the TWAP was created: the state''s own timestamp, which never moves';
comment on column twap_status.status is 'activated, finished, terminated or error; others as served';
comment on column twap_status.status_error is 'the message of status error';
comment on column twap_status.side is 'B buys, A sells';
comment on column twap_status.size_requested is 'units of the coin, as size_executed is';
comment on column twap_status.notional_executed is 'USD';
comment on column twap_status.is_exact is 'false: the file held floating-point numbers, so digits may be lost; gives way to an exact row';
comment on column twap_status.s3_last_modified is 'of the object: of two with the same event the newer one wins';
comment on column twap_status.object_id is 'etl_s3_ingest_log.object_id; no foreign key, as the log may be cleared';
comment on column twap_status.raw_payload is 'the whole event as served; integers beyond 2^53 as text, for JavaScript''s sake';

create table fills (
    user_address   text collate "C" not null,
    coin           text collate "C" not null,
    tid            bigint not null,
    oid            bigint not null,
    side           text collate "C" not null,
    time           timestamptz not null,
    event_ix       integer not null default 0,
    px             numeric not null,
    sz             numeric not null,
    dir            text,
    start_position numeric,
    closed_pnl     numeric,
    fee            numeric,
    fee_token      text,
    crossed        boolean,
    hash           text,
    block_time     timestamptz,
    block_number   bigint,
    twap_id        bigint,
    cloid          text,
    builder        text,
    builder_fee    numeric,
    deployer_fee   numeric,
    priority_gas   numeric,
    liquidation    jsonb,
    extra          jsonb,
    is_exact       boolean not null default true,
    source         text collate "C" not null,
    object_id      bigint,
    primary key (user_address, coin, tid, oid, side, time, event_ix),
    constraint fills_row check (
        side in ('A', 'B') and source in ('api', 's3') and event_ix >= 0
        and time >= '2023-01-01 00:00:00+00' and time < '2100-01-01 00:00:00+00'
        and user_address ~ '^0x[0-9a-f]{40}$')
) partition by range (time);
create table fills_default partition of fills default;
create index fills_coin_time on fills (coin, time);
create index fills_object on fills using brin (object_id);
comment on table fills is
    'One row a side of a trade: both sides share one tid. Dust conversions all have tid 0.';
comment on column fills.user_address is 'lower case';
comment on column fills.coin is 'BTC; @107 or PURR/USDC for spot; xyz:NFLX on a builder-deployed dex';
comment on column fills.tid is 'number of the trade; not unique beyond a block';
comment on column fills.side is 'B bought, A sold';
comment on column fills.time is 'by the exchange''s clock, in milliseconds';
comment on column fills.event_ix is '0; 1, 2, ... for further fills of one block or page with the same key, in their order';
comment on column fills.px is 'USD, or units of the quote token for spot';
comment on column fills.sz is 'units of the coin';
comment on column fills.start_position is 'units of the coin held before the fill';
comment on column fills.closed_pnl is 'USD, before fees';
comment on column fills.fee is 'units of fee_token; negative for a rebate';
comment on column fills.crossed is 'true for the taker';
comment on column fills.hash is 'of the transaction; zeros for slices of a TWAP, on both sides';
comment on column fills.twap_id is 'of the TWAP that this fill is a slice of, on its owner''s side only';
comment on column fills.block_time is 'cut to microseconds; NULL from the API, as block_number is';
comment on column fills.liquidation is 'liquidatedUser, markPx and method, as served';
comment on column fills.extra is 'fields that have no column of their own, as served';
comment on column fills.is_exact is 'false: the file held floating-point numbers, so digits may be lost; gives way to an exact row';
comment on column fills.source is 's3 or api; of two the s3 row wins, but never puts NULL over a value';
comment on column fills.object_id is 'etl_s3_ingest_log.object_id of the object that last changed the row; NULL from the API';

-- For ever; the partitions of a day are made by `hlcli maintain`, those of the past when their rows come.
insert into retention_rules (table_name, time_column, keep, partition_span) values ('fills', 'time', null, '1 day');
