-- The vaults whose details are due, most urgent first. The order rests only on metrics from before this hour, so a
-- second run in the same hour finds the same list and skips what the first one stored: a killed run resumes.
-- Urgency is age times a weight that grows with TVL: the large are seen often, the small still get their turn.
-- name: due
with candidate as (
    select v.vault_address, v.tvl_usd,
           greatest((select max(m.observed_at) from hyperliquid_vaults_discovery.vault_metrics m
                      where m.vault_address = v.vault_address and m.observed_at < %(hour)s),
                    case when v.details_failed_at < %(hour)s then v.details_failed_at end) as last_seen
    from hyperliquid_vaults_discovery.vaults v
    where case when %(addresses)s::text[] is not null then v.vault_address = any (%(addresses)s::text[])
               else (%(include_closed)s or not v.is_closed)
                    and (%(min_tvl)s::numeric is null or v.tvl_usd >= %(min_tvl)s::numeric) end
)
select vault_address,
       exists (select from hyperliquid_vaults_discovery.vault_metrics m
                where m.vault_address = candidate.vault_address and m.observed_at = %(hour)s) as done
from candidate
order by last_seen is not null,
         extract(epoch from %(hour)s - coalesce(last_seen, %(hour)s))
             * ln(exp(1::numeric) + greatest(coalesce(tvl_usd, 0), 0)) desc,
         tvl_usd desc nulls last, vault_address

-- A vault that cannot be read must not head the queue for ever.
-- name: details_failed
update hyperliquid_vaults_discovery.vaults set details_failed_at = %(hour)s
where vault_address = any (%(addresses)s) and details_failed_at is distinct from %(hour)s

-- Every vault with its place in the ranking, or the reason why it has none.
-- name: rank
with standing as (
    select v.vault_address, v.tvl_usd, latest.observed_at, latest.max_distributable_tvl,
           case when v.is_closed then 'closed'
                when latest.observed_at is null then 'never measured'
                when latest.observed_at < %(oldest)s then 'stale'
                when latest.max_distributable_tvl is null then 'no max distributable'
           end as left_out
    from hyperliquid_vaults_discovery.vaults v
    left join lateral (
        select m.observed_at, m.max_distributable_tvl from hyperliquid_vaults_discovery.vault_metrics m
        where m.vault_address = v.vault_address order by m.observed_at desc limit 1
    ) latest on true
)
select vault_address, tvl_usd, observed_at, max_distributable_tvl, left_out,
       row_number() over (
           partition by left_out is null order by max_distributable_tvl desc nulls last, vault_address) as place
from standing
order by place

-- name: drop_unranked
delete from hyperliquid_vaults_discovery.top_500_vaults where not vault_address = any (%s)
