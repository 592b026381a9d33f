-- What a paced caller reserved too much is given back at the rate at which it was charged: slower than the whole
-- limit while urgent callers are about. Else a backfill that reserves for full pages and gets short ones uses half of
-- what is free.
create or replace function budget_settle(
    key text, granted_second bigint, reserved bigint, cost bigint, rank integer,
    refused_s double precision, weight_limit bigint
) returns void
language plpgsql as $$
declare
    strikes_now integer;
    used_urgent bigint;
begin
    select strikes into strikes_now from rate_budget where egress_key = key for update;
    update rate_budget_buckets b
        set weight = greatest(b.weight - reserved, 0),
            urgent_weight = greatest(b.urgent_weight - case when rank = 0 then reserved else 0 end, 0),
            requests = greatest(b.requests - 1, 0)
        where b.egress_key = key and b.second = granted_second;
    insert into rate_budget_buckets as b (egress_key, second, weight, urgent_weight, requests)
        values (key, floor(extract(epoch from clock_timestamp()))::bigint, cost,
                case when rank = 0 then cost else 0 end, 1)
        on conflict (egress_key, second) do update
            set weight = b.weight + excluded.weight, urgent_weight = b.urgent_weight + excluded.urgent_weight,
                requests = b.requests + 1;
    if refused_s is not null then
        update rate_budget
            set strikes = strikes + 1,
                blocked_until = greatest(blocked_until, clock_timestamp() + make_interval(secs =>
                    case when refused_s > 0 then refused_s else least(60, 10 * 2 ^ least(strikes_now, 3)) end))
            where egress_key = key;
    else
        if strikes_now > 0 then
            update rate_budget set strikes = 0 where egress_key = key;
        end if;
        if reserved > cost and rank > 0 then
            select coalesce(sum(b.urgent_weight), 0) into used_urgent
                from rate_budget_buckets b where b.egress_key = key;
            -- The rate of budget_reserve().
            update rate_budget
                set paced_until = paced_until - make_interval(secs => (reserved - cost)
                    / greatest((weight_limit - used_urgent) / 60.0, weight_limit / 600.0)::double precision)
                where egress_key = key;
        end if;
    end if;
end
$$;
