-- Vaults: the list, hourly metrics and the ranking.

create schema hyperliquid_vaults_discovery;

create table hyperliquid_vaults_discovery.vaults (
    vault_address            text collate "C" primary key,
    name                     text,
    leader_address           text collate "C",
    description              text,
    tvl_usd                  numeric,
    apr                      numeric,
    is_closed                boolean not null,
    relationship_type        text,
    parent_address           text collate "C",
    child_addresses          jsonb,
    allow_deposits           boolean,
    always_close_on_withdraw boolean,
    vault_create_time        timestamptz,
    details_failed_at        timestamptz,
    created_at               timestamptz not null default clock_timestamp(),
    updated_at               timestamptz not null,
    constraint vaults_address check (vault_address ~ '^0x[0-9a-f]{40}$')
);
comment on table hyperliquid_vaults_discovery.vaults is
    'Every vault that the exchange''s list ever named. The address is the only key: names repeat.';
comment on column hyperliquid_vaults_discovery.vaults.apr is 'as the list serves it: a fraction, 0.1 is 10 %';
comment on column hyperliquid_vaults_discovery.vaults.description is 'from vaultDetails, as are the two flags';
comment on column hyperliquid_vaults_discovery.vaults.details_failed_at is
    'last hour in which vaultDetails gave nothing usable; such a vault waits its turn like one that was read';
comment on column hyperliquid_vaults_discovery.vaults.updated_at is 'start of the run that last changed the row';

-- No foreign key to vaults: a vault whose row is in quarantine may still have good metrics.
create table hyperliquid_vaults_discovery.vault_metrics (
    vault_address             text collate "C" not null,
    observed_at               timestamptz not null,
    source_ts                 timestamptz,
    apr                       numeric,
    account_value             numeric,
    max_distributable_tvl     numeric,
    max_withdrawable          numeric,
    leader_fraction           numeric,
    leader_commission         numeric,
    follower_count            integer,
    followers_truncated       boolean,
    is_closed                 boolean,
    pnl_day                   numeric,
    pnl_week                  numeric,
    pnl_month                 numeric,
    pnl_all_time              numeric,
    vlm_day                   numeric,
    vlm_week                  numeric,
    vlm_month                 numeric,
    vlm_all_time              numeric,
    max_drawdown_day          numeric,
    max_drawdown_week         numeric,
    max_drawdown_month        numeric,
    max_drawdown_all_time     numeric,
    max_drawdown_pnl_day      numeric,
    max_drawdown_pnl_week     numeric,
    max_drawdown_pnl_month    numeric,
    max_drawdown_pnl_all_time numeric,
    primary key (vault_address, observed_at),
    constraint vault_metrics_address check (vault_address ~ '^0x[0-9a-f]{40}$')
);
create index vault_metrics_observed on hyperliquid_vaults_discovery.vault_metrics (observed_at);
comment on table hyperliquid_vaults_discovery.vault_metrics is 'One row per vault and hour in which it was asked.';
comment on column hyperliquid_vaults_discovery.vault_metrics.observed_at is 'the hour in which the run started, UTC';
comment on column hyperliquid_vaults_discovery.vault_metrics.source_ts is
    'the newest point of the served history; may stay behind observed_at';
comment on column hyperliquid_vaults_discovery.vault_metrics.account_value is 'newest account value, USD';
comment on column hyperliquid_vaults_discovery.vault_metrics.max_distributable_tvl is
    'USD; NULL where the source leaves it out';
comment on column hyperliquid_vaults_discovery.vault_metrics.follower_count is
    'followers served; the source cuts the list at 100, then followers_truncated is true';
comment on column hyperliquid_vaults_discovery.vault_metrics.pnl_day is 'USD, last point of the window''s pnl series';
comment on column hyperliquid_vaults_discovery.vault_metrics.max_drawdown_day is
    'percent below the highest account value; deposits and withdrawals distort it';
comment on column hyperliquid_vaults_discovery.vault_metrics.max_drawdown_pnl_day is
    'percent, from the chained returns pnl change / account value: free of deposits and withdrawals';

create table hyperliquid_vaults_discovery.top_500_vaults (
    vault_address         text collate "C" primary key,
    rank                  integer not null,
    max_distributable_tvl numeric not null,
    tvl_usd               numeric,
    metrics_time          timestamptz not null,
    updated_at            timestamptz not null
);
create index top_500_vaults_rank on hyperliquid_vaults_discovery.top_500_vaults (rank);
comment on table hyperliquid_vaults_discovery.top_500_vaults is
    'Open vaults by max_distributable_tvl, from metrics that were fresh when `hlcli rank vaults` ran.';
comment on column hyperliquid_vaults_discovery.top_500_vaults.metrics_time is 'observed_at of the metrics ranked';
comment on column hyperliquid_vaults_discovery.top_500_vaults.updated_at is 'when rank or metrics last changed';
