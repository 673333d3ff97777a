-- Takes the trainer's lease, unless somebody else holds it.
-- KEYS: epoch, lease. ARGV: holder, time to live in ms, the highest epoch known elsewhere, a holder
-- known to be dead or ''.
-- Returns the new epoch, higher than that one and all before, and the holder; or 0 and the other
-- holder.
-- Safe to repeat: the same holder gets the lease again under a higher epoch, and uses the last one.
-- DEL comes first and frees memory, for a full Redis.
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[1] and holder ~= ARGV[4] then return {0, holder} end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], ARGV[1], 'PX', ARGV[2])
local epoch = math.max(tonumber(redis.call('GET', KEYS[1]) or 0), tonumber(ARGV[3])) + 1
redis.call('SET', KEYS[1], string.format('%.0f', epoch))
return {epoch, ARGV[1]}
