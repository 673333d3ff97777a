-- Makes some places all that is offered of weights, and deletes the chunks of the others.
-- Fenced. KEYS: epoch, weights, weights:places, the chunks of each place that goes.
-- ARGV: epoch, how many places go, these, then place and description of each that stays.
-- Safe to repeat: the same result. DEL and UNLINK come first and free memory, for a full Redis.
redis.call('DEL', KEYS[2])
for i = 4, #KEYS do redis.call('UNLINK', KEYS[i]) end
local gone = tonumber(ARGV[2])
for i = 3, 2 + gone do redis.call('SREM', KEYS[3], ARGV[i]) end
for i = 3 + gone, #ARGV, 2 do redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
return 1
