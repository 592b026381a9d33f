-- Wallets: the universe of top traders, their positions minute by minute, signals and alerts; and what is kept how long.

-- The database's clock. A simulation may shift it for a session (set hlcli.clock_offset); nothing else does.
create function hlcli_now() returns timestamptz
language sql volatile as $$
    select clock_timestamp() + coalesce(nullif(current_setting('hlcli.clock_offset', true), ''), '0')::interval
$$;
comment on function hlcli_now is 'clock_timestamp(), shifted by the interval in hlcli.clock_offset where one is set';

create table retention_rules (
    table_name     text primary key,
    time_column    text not null,
    keep           interval not null,
    partition_span interval,
    constraint retention_rules_keep check (keep > '0'),
    constraint retention_rules_span check (partition_span >= '1 hour')
);
comment on table retention_rules is 'What `hlcli maintain` removes. Change `keep` to keep more or less.';
comment on column retention_rules.keep is
    'rows are removed when time_column is older than this; of a partitioned table whole partitions, so up to one later';
comment on column retention_rules.partition_span is
    'for a table partitioned by range of time_column: the length of a partition; NULL for a plain table';

create table wallet_universe_runs (
    run_id              bigint generated always as identity primary key,
    as_of_ts            timestamptz not null,
    status              text not null,
    source              text,
    n_requested         integer not null,
    n_received          integer not null default 0,
    n_listed            integer not null default 0,
    entered_count       integer not null default 0,
    exited_count        integer not null default 0,
    churn_warning_count integer not null default 0,
    duration_ms         integer not null,
    error               text,
    ledger_run_id       uuid not null unique,
    created_at          timestamptz not null default clock_timestamp(),
    constraint wallet_universe_runs_status check (status in ('success', 'failed')),
    constraint wallet_universe_runs_source check (source in ('stats-data', 'info-api')),
    constraint wallet_universe_runs_requested check (n_requested > 0)
);
create index wallet_universe_runs_as_of on wallet_universe_runs (as_of_ts);
comment on table wallet_universe_runs is 'One row a `hlcli universe refresh`, failed ones with the reason.';
comment on column wallet_universe_runs.run_id is 'number of the refresh; ledger_run_id is its row in ingestion_runs';
comment on column wallet_universe_runs.source is 'whose list was taken or refused; NULL when none could be had';
comment on column wallet_universe_runs.n_received is 'wallets taken, at most n_requested';
comment on column wallet_universe_runs.n_listed is 'usable rows in the list served';
comment on column wallet_universe_runs.churn_warning_count is
    'how many runs in a row, this one included, had wallets enter and leave that together are over 30 % of it';

create table wallet_universe_members (
    run_id        bigint not null references wallet_universe_runs on delete cascade,
    wallet_id     text collate "C" not null,
    rank          integer not null,
    month_pnl     numeric not null,
    month_roi     numeric,
    account_value numeric,
    display_name  text,
    as_of_ts      timestamptz not null,
    primary key (run_id, wallet_id),
    constraint wallet_universe_members_wallet check (wallet_id ~ '^0x[0-9a-f]{40}$'),
    constraint wallet_universe_members_rank check (rank > 0)
);
create index wallet_universe_members_as_of on wallet_universe_members (as_of_ts);
comment on table wallet_universe_members is
    'The universe as each successful run found it; columns as in wallet_universe_current.';

create table wallet_universe_current (
    wallet_id     text collate "C" primary key,
    rank          integer not null,
    month_pnl     numeric not null,
    month_roi     numeric,
    account_value numeric,
    display_name  text,
    as_of_ts      timestamptz not null,
    updated_at    timestamptz not null,
    constraint wallet_universe_current_wallet check (wallet_id ~ '^0x[0-9a-f]{40}$'),
    constraint wallet_universe_current_rank check (rank > 0),
    -- Two wallets may swap places in one statement.
    constraint wallet_universe_current_place unique (rank) deferrable initially deferred
);
comment on table wallet_universe_current is 'The wallets that are watched: the best by pnl of 30 days.';
comment on column wallet_universe_current.month_pnl is 'USD';
comment on column wallet_universe_current.month_roi is 'a fraction, 0.1 is 10 %';
comment on column wallet_universe_current.account_value is 'USD';
comment on column wallet_universe_current.display_name is 'as its owner chose it: any text, do not trust it';
comment on column wallet_universe_current.as_of_ts is 'start of the run that confirmed the row';
comment on column wallet_universe_current.updated_at is 'the same; kept for readers of the original schema';

create table wallet_snapshots (
    snapshot_ts    timestamptz not null,
    wallet_id      text collate "C" not null,
    asset          text collate "C" not null,
    position_szi   numeric,
    entry_px       numeric,
    liq_px         numeric,
    leverage       numeric,
    leverage_type  text,
    margin_used    numeric,
    position_value numeric,
    missing_reason text,
    is_dirty       boolean not null default false,
    dirty_reason   text,
    source_ts      timestamptz,
    ingest_run_id  bigint not null,
    created_at     timestamptz not null default clock_timestamp(),
    primary key (snapshot_ts, wallet_id, asset),
    constraint wallet_snapshots_three_states check ((position_szi is null) = (missing_reason is not null)),
    constraint wallet_snapshots_dirty check (is_dirty = (dirty_reason is not null))
) partition by range (snapshot_ts);
create table wallet_snapshots_default partition of wallet_snapshots default;
create index wallet_snapshots_wallet on wallet_snapshots (wallet_id, asset, snapshot_ts);
comment on table wallet_snapshots is
    'One row per minute, wallet and asset. position_szi: a value, 0 for no position, NULL for not known.';
comment on column wallet_snapshots.snapshot_ts is 'the minute, by the database''s clock';
comment on column wallet_snapshots.asset is 'coin; of a builder-deployed market with its dex, dex:COIN';
comment on column wallet_snapshots.position_szi is 'units of the coin, negative for short; 0: seen to be flat';
comment on column wallet_snapshots.liq_px is 'USD; NULL where the exchange names none';
comment on column wallet_snapshots.margin_used is 'USD, as are entry_px and position_value';
comment on column wallet_snapshots.entry_px is 'USD; NULL without a position, as are the columns that follow';
comment on column wallet_snapshots.leverage is 'as set by the wallet, 20 is 20x';
comment on column wallet_snapshots.leverage_type is 'cross or isolated';
comment on column wallet_snapshots.dirty_reason is 'null_szi, transient_collapse or szi_jump';
comment on column wallet_snapshots.missing_reason is 'why position_szi is NULL';
comment on column wallet_snapshots.is_dirty is
    'not to be trusted: unknown, or found implausible by the snapshots around it (table snapshot_anomalies)';
comment on column wallet_snapshots.source_ts is 'the exchange''s own time of the answer';
comment on column wallet_snapshots.ingest_run_id is 'ingest_runs.run_id; no foreign key, as both are removed by age';

create table snapshot_anomalies (
    id           bigint generated always as identity primary key,
    detected_at  timestamptz not null default clock_timestamp(),
    snapshot_ts  timestamptz not null,
    wallet_id    text collate "C" not null,
    asset        text collate "C" not null,
    anomaly_type text not null,
    details      jsonb not null default '{}',
    constraint snapshot_anomalies_type check (
        anomaly_type in ('transient_collapse', 'szi_jump', 'null_szi', 'other')),
    constraint snapshot_anomalies_once unique (snapshot_ts, wallet_id, asset, anomaly_type)
);
create index snapshot_anomalies_detected on snapshot_anomalies (detected_at);
comment on table snapshot_anomalies is
    'transient_collapse: gone for one minute; szi_jump: twentyfold for one minute; null_szi: could not be read.';
comment on column snapshot_anomalies.details is 'the positions before, found and after; or the reason of a null';

create table ingest_runs (
    run_id            bigint generated always as identity primary key,
    snapshot_ts       timestamptz not null unique,
    status            text not null,
    wallets_expected  integer not null,
    wallets_succeeded integer not null,
    wallets_failed    integer not null,
    rows_expected     integer not null,
    rows_written      integer not null,
    coverage_pct      numeric not null,
    duration_ms       integer not null,
    error             text,
    ledger_run_id     uuid not null,
    created_at        timestamptz not null default clock_timestamp(),
    constraint ingest_runs_status check (status in ('success', 'partial', 'failed')),
    constraint ingest_runs_wallets check (wallets_expected = wallets_succeeded + wallets_failed),
    constraint ingest_runs_coverage check (coverage_pct between 0 and 100)
);
comment on table ingest_runs is 'One row a snapshot minute, however often it was run.';
comment on column ingest_runs.run_id is 'number of the minute; not that of ingestion_runs, which is ledger_run_id';
comment on column ingest_runs.error is 'the commonest reasons why wallets could not be read, each with how often';
comment on column ingest_runs.status is 'by coverage: success from 95 %, partial from 80 %, else failed';
comment on column ingest_runs.wallets_succeeded is 'wallets with a position known for every asset';
comment on column ingest_runs.rows_written is 'rows whose position is known; the others are NULL with a reason';
comment on column ingest_runs.ledger_run_id is 'ingestion_runs.run_id of the last run of this minute';

create table ingest_health (
    health_ts                timestamptz primary key,
    last_success_snapshot_ts timestamptz,
    snapshot_status          text not null,
    coverage_pct             numeric not null,
    health_state             text not null,
    error                    text,
    constraint ingest_health_state check (health_state in ('healthy', 'degraded', 'stale'))
);
comment on table ingest_health is
    'Health after each snapshot minute (health_ts). For health now read v_latest_health, which looks at the clock.';
comment on column ingest_health.last_success_snapshot_ts is 'the newest minute that did not fail';

create table signals (
    signal_ts           timestamptz not null,
    asset               text collate "C" not null,
    formula_version     text collate "C" not null,
    alignment_score     numeric not null,
    alignment_score_ntl numeric,
    alignment_trend     text not null,
    dispersion_index    numeric,
    exit_cluster_score  numeric,
    exit_cluster_size   numeric,
    exit_cluster_z      numeric,
    allowed_playbook    text not null,
    risk_mode           text not null,
    add_exposure        boolean not null,
    tighten_stops       boolean not null,
    add_long_count      integer not null,
    add_short_count     integer not null,
    reducer_count       integer not null,
    holder_count        integer not null,
    wallet_count        integer not null,
    missing_count       integer not null,
    dirty_count         integer not null,
    snapshot_count      integer not null,
    is_degraded         boolean not null,
    degraded_reason     text,
    computation_ms      integer not null,
    primary key (signal_ts, asset, formula_version),
    constraint signals_version check (formula_version in ('v1', 'v2')),
    constraint signals_trend check (alignment_trend in ('rising', 'flat', 'falling')),
    constraint signals_playbook check (allowed_playbook in ('Long-only', 'Short-only', 'No-trade')),
    constraint signals_risk check (risk_mode in ('Normal', 'Reduced', 'Defensive')),
    constraint signals_degraded check (is_degraded = (degraded_reason is not null))
);
comment on table signals is
    'What the watched wallets did between two five-minute windows; formulas in hlcli/features/signals.py.';
comment on column signals.signal_ts is 'end of the window; the window before it is what it is compared with';
comment on column signals.formula_version is 'v1: as first defined, seldom fires; v2: ours';
comment on column signals.alignment_trend is 'the score against its mean of the 15 minutes before: 5 more, or less';
comment on column signals.allowed_playbook is 'with the crowd, if at all: Long-only, Short-only or No-trade';
comment on column signals.risk_mode is 'Normal, Reduced or Defensive';
comment on column signals.add_exposure is 'whether the crowd still builds up without leaving';
comment on column signals.tighten_stops is 'whether it leaves, divides or turns';
comment on column signals.add_long_count is 'wallets that added to or opened a long, beyond what is dust for them';
comment on column signals.add_short_count is 'the same for shorts; in v2 a flip counts here and among the reducers';
comment on column signals.reducer_count is 'wallets that cut or closed a position';
comment on column signals.holder_count is 'wallets that held a position in the window before';
comment on column signals.dirty_count is 'wallets with a value in the window that was found implausible';
comment on column signals.degraded_reason is 'why the signal rests on thin data; NULL when it does not';
comment on column signals.alignment_score is '0 all sell, 50 balance, 100 all buy';
comment on column signals.alignment_score_ntl is 'the same weighted by size (v2)';
comment on column signals.dispersion_index is '0 unanimous to 100 divided; NULL when too few moved (v2)';
comment on column signals.exit_cluster_score is 'percent: v1 of all wallets, v2 of holders; NULL under ten holders (v2)';
comment on column signals.exit_cluster_size is 'percent of the size held that was given up (v2)';
comment on column signals.exit_cluster_z is 'standard deviations above the day''s usual share of reducers (v2)';
comment on column signals.wallet_count is 'wallets known in both windows';
comment on column signals.missing_count is 'wallets expected but not known in both windows';
comment on column signals.snapshot_count is 'usable snapshots in the window, of 5';

create table signal_contributors (
    signal_ts       timestamptz not null,
    asset           text collate "C" not null,
    pct_add_long    numeric not null,
    pct_add_short   numeric not null,
    pct_reducers    numeric not null,
    pct_flat        numeric not null,
    count_add_long  integer not null,
    count_add_short integer not null,
    count_reducers  integer not null,
    count_flat      integer not null,
    total_wallets   integer not null,
    primary key (signal_ts, asset),
    constraint signal_contributors_sum check (
        total_wallets = 0 or pct_add_long + pct_add_short + pct_reducers + pct_flat between 99 and 101),
    constraint signal_contributors_counts check (
        count_add_long + count_add_short + count_reducers + count_flat = total_wallets)
);
comment on table signal_contributors is
    'The v1 classes of wallets, each wallet in exactly one; pct_ is percent of total_wallets.';

create table alerts (
    id              bigint generated always as identity primary key,
    alert_ts        timestamptz not null,
    asset           text collate "C" not null,
    alert_type      text not null,
    severity        text not null,
    message         text not null,
    signal_snapshot jsonb not null default '{}',
    cooldown_until  timestamptz,
    suppressed      boolean not null default false,
    created_at      timestamptz not null default clock_timestamp(),
    constraint alerts_type check (alert_type in ('regime_change', 'exit_cluster', 'system_stale')),
    constraint alerts_severity check (severity in ('medium', 'high', 'critical')),
    constraint alerts_once unique (alert_ts, asset, alert_type)
);
comment on table alerts is 'Raised by `hlcli signals compute` from the v2 signals.';
comment on column alerts.alert_ts is 'the signal''s time; for system_stale the time of detection';
comment on column alerts.signal_snapshot is 'the v2 signal that raised it, as a row of signals';
comment on column alerts.suppressed is 'not worth sending: in cooldown, over the daily cap, or while the system is stale';

create table alert_state (
    asset              text collate "C" not null,
    alert_type         text not null,
    is_active          boolean not null default false,
    last_triggered_ts  timestamptz,
    cooldown_until     timestamptz,
    daily_count        integer not null default 0,
    daily_window_start timestamptz,
    current_playbook   text,
    pending_playbook   text,
    pending_periods    integer not null default 0,
    last_evaluated_ts  timestamptz,
    primary key (asset, alert_type),
    constraint alert_state_type check (alert_type in ('regime_change', 'exit_cluster', 'system_stale'))
);
comment on table alert_state is 'Where each kind of alert stands; assets beyond the first three are added as they come.';
comment on column alert_state.is_active is 'has fired and is not re-armed';
comment on column alert_state.last_evaluated_ts is 'signal_ts up to which this alert was decided; of SYSTEM the time';
comment on column alert_state.daily_count is 'alerts since daily_window_start, which moves on after 24 hours';
comment on column alert_state.current_playbook is 'the playbook that counts; pending_playbook must come twice to replace it';
insert into alert_state (asset, alert_type) values
    ('HYPE', 'regime_change'), ('HYPE', 'exit_cluster'),
    ('BTC', 'regime_change'), ('BTC', 'exit_cluster'),
    ('ETH', 'regime_change'), ('ETH', 'exit_cluster'),
    ('SYSTEM', 'system_stale');

-- The only place that knows the ages: healthy to 120 s, degraded to 600 s, then stale.
create view v_latest_health as
select hlcli_now() as health_ts, good.snapshot_ts as last_success_snapshot_ts,
       last.snapshot_ts as last_snapshot_ts, last.status as snapshot_status, last.coverage_pct,
       extract(epoch from hlcli_now() - good.snapshot_ts)::double precision as age_s,
       case when good.snapshot_ts is null or last.status = 'failed'
                 or hlcli_now() - good.snapshot_ts > interval '600 seconds' then 'stale'
            when last.status = 'partial' or hlcli_now() - good.snapshot_ts > interval '120 seconds' then 'degraded'
            else 'healthy' end as health_state,
       last.error
from (select) one
left join lateral (
    select r.snapshot_ts, r.status, r.coverage_pct, r.error from ingest_runs r order by r.snapshot_ts desc limit 1
) last on true
left join lateral (
    select r.snapshot_ts from ingest_runs r where r.status <> 'failed' order by r.snapshot_ts desc limit 1
) good on true;
comment on view v_latest_health is 'One row, always: how fresh and complete the snapshots are at this moment.';

create view v_latest_signals as
select distinct on (s.asset) s.* from signals s where s.formula_version = 'v2' order by s.asset, s.signal_ts desc;
comment on view v_latest_signals is 'The newest v2 signal of each asset.';

create view v_recent_alerts as
select a.* from alerts a
where not a.suppressed and a.alert_ts > hlcli_now() - interval '24 hours'
order by a.alert_type = 'system_stale' desc, a.alert_ts desc, a.asset
limit 5;
comment on view v_recent_alerts is 'The last day''s alerts, five at most, trouble with the data first.';

insert into retention_rules (table_name, time_column, keep, partition_span) values
    ('wallet_snapshots', 'snapshot_ts', '7 days', '1 day'),
    ('wallet_universe_members', 'as_of_ts', '30 days', null),
    ('snapshot_anomalies', 'detected_at', '30 days', null),
    ('ingest_runs', 'snapshot_ts', '7 days', null),
    ('ingest_health', 'health_ts', '7 days', null),
    ('signals', 'signal_ts', '30 days', null),
    ('signal_contributors', 'signal_ts', '7 days', null),
    ('alerts', 'alert_ts', '90 days', null),
    ('ingestion_runs', 'started_at', '90 days', null);
