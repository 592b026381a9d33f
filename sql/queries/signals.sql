-- Windows end at multiples of five minutes and hold the snapshots after the last end up to and with their own.
-- A row is in the window that date_bin finds for an instant a microsecond earlier.

-- The newest window whose snapshots can be complete: what is dirty is known a minute late.
-- name: newest_window
select date_bin('5 minutes', hlcli_now() - interval '2 minutes', 'epoch'),
       (select max(signal_ts) from signals where signal_ts <= hlcli_now()),
       (select min(signal_ts) from signals), (select min(snapshot_ts) from wallet_snapshots), hlcli_now()

-- The last clean position of each wallet and asset in each window. Snapshots lie on whole minutes, so a window has
-- five of a wallet: five maxima of one value each need no sort. Who left the universe within the window tells nothing
-- in it: counted, it would stand in for one who came and could not be read.
-- name: positions
select asset, wallet_id, (extract(epoch from window_end) * 1000000)::bigint,
       case when max(snapshot_ts) = max(max(snapshot_ts)) over (partition by asset, window_end) then
            coalesce(max(clean) filter (where snapshot_ts = window_end),
                     max(clean) filter (where snapshot_ts = window_end - interval '1 minute'),
                     max(clean) filter (where snapshot_ts = window_end - interval '2 minutes'),
                     max(clean) filter (where snapshot_ts = window_end - interval '3 minutes'),
                     max(clean) filter (where snapshot_ts = window_end - interval '4 minutes'))
       end,
       bool_or(is_dirty and position_szi is not null)
from (
    select asset, wallet_id, snapshot_ts, case when not is_dirty then position_szi end as clean,
           position_szi, is_dirty,
           date_bin('5 minutes', snapshot_ts - interval '1 microsecond', 'epoch') + interval '5 minutes' as window_end
    from wallet_snapshots
    where snapshot_ts > %(after)s and snapshot_ts <= %(until)s
) placed
group by asset, wallet_id, window_end

-- Also the windows without any snapshot, so that they are told, and the one before the first.
-- name: windows
select (extract(epoch from window_end) * 1000000)::bigint,
       count(*) filter (where status <> 'failed'), count(*) filter (where status = 'partial'),
       (array_agg(wallets_expected order by snapshot_ts desc))[1], window_end >= %(first)s
from generate_series(%(first)s::timestamptz - interval '5 minutes', %(until)s, '5 minutes') window_end
left join ingest_runs on snapshot_ts > window_end - interval '5 minutes' and snapshot_ts <= window_end
group by window_end

-- name: past
select (extract(epoch from signal_ts) * 1000000)::bigint, asset, formula_version, alignment_score,
       reducer_count, holder_count
from signals where signal_ts >= %(first)s::timestamptz - interval '24 hours' and signal_ts < %(first)s

-- name: alert_states
select asset, alert_type, is_active, last_triggered_ts, cooldown_until, daily_count, daily_window_start,
       current_playbook, pending_playbook, pending_periods, last_evaluated_ts
from alert_state

-- name: to_evaluate
select signal_ts, asset, allowed_playbook, exit_cluster_z, reducer_count, holder_count,
       missing_count::float8 / greatest(wallet_count + missing_count, 1)
from signals where formula_version = 'v2' and signal_ts > %(after)s

-- name: keep_alert_state
insert into alert_state (asset, alert_type, is_active, last_triggered_ts, cooldown_until, daily_count,
    daily_window_start, current_playbook, pending_playbook, pending_periods, last_evaluated_ts)
values (%(asset)s, %(alert_type)s, %(is_active)s, %(last_triggered_ts)s, %(cooldown_until)s, %(daily_count)s,
    %(daily_window_start)s, %(current_playbook)s, %(pending_playbook)s, %(pending_periods)s, %(last_evaluated_ts)s)
on conflict (asset, alert_type) do update set is_active = excluded.is_active,
    last_triggered_ts = excluded.last_triggered_ts, cooldown_until = excluded.cooldown_until,
    daily_count = excluded.daily_count, daily_window_start = excluded.daily_window_start,
    current_playbook = excluded.current_playbook, pending_playbook = excluded.pending_playbook,
    pending_periods = excluded.pending_periods, last_evaluated_ts = excluded.last_evaluated_ts

-- name: keep_alert
insert into alerts (alert_ts, asset, alert_type, severity, message, signal_snapshot, cooldown_until, suppressed)
values (%(alert_ts)s, %(asset)s, %(alert_type)s, %(severity)s, %(message)s,
    coalesce((select to_jsonb(s) from signals s where s.signal_ts = %(alert_ts)s and s.asset = %(asset)s
              and s.formula_version = 'v2'), '{}'), %(cooldown_until)s, %(suppressed)s)
on conflict (alert_ts, asset, alert_type) do nothing

-- name: last_usable
select last_success_snapshot_ts, health_ts from v_latest_health

-- The newest signals, or those since a moment.
-- name: show
select signal_ts, asset, formula_version, alignment_score, alignment_score_ntl, alignment_trend, dispersion_index,
       exit_cluster_score, exit_cluster_size, exit_cluster_z, allowed_playbook, risk_mode, add_exposure,
       tighten_stops, add_long_count, add_short_count, reducer_count, holder_count, wallet_count, missing_count,
       dirty_count, snapshot_count, is_degraded, degraded_reason
from signals
where (%(assets)s::text[] is null or asset = any (%(assets)s::text[]))
  and (%(version)s::text is null or formula_version = %(version)s)
  and signal_ts >= coalesce(%(since)s::timestamptz, (select max(signal_ts) from signals))
order by signal_ts desc, asset, formula_version
limit %(limit)s

-- name: recent_alerts
select alert_ts, asset, alert_type, severity, message from v_recent_alerts
