-- Reports the tokens that a worker has spent so far, and adds up those of all workers.
-- KEYS: spent. ARGV: worker, its total so far.
-- Returns the total of all.
-- Safe to repeat: a worker's total never falls, as a predecessor may have had its name. HDEL comes
-- first and frees memory, for a full Redis.
local before = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or 0)
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], math.max(before, tonumber(ARGV[2])))
local total = 0
for _, spent in ipairs(redis.call('HVALS', KEYS[1])) do total = total + tonumber(spent) end
return total
