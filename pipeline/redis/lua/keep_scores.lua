-- Keeps scores, and forgets those used longest ago beyond the bounds.
-- KEYS: scores, used, clock, bytes. ARGV: most entries, most bytes, then digest, scores, …
-- Safe to repeat: HSETNX counts the bytes of each digest once. A full Redis refuses the first write,
-- and with it the whole call.
for i = 3, #ARGV, 2 do
  if redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1]) == 1 then
    redis.call('INCRBY', KEYS[4], #ARGV[i + 1])
  end
  redis.call('ZADD', KEYS[2], redis.call('INCR', KEYS[3]), ARGV[i])
end
local most, bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
while redis.call('ZCARD', KEYS[2]) > most or tonumber(redis.call('GET', KEYS[4])) > bytes do
  local oldest = redis.call('ZPOPMIN', KEYS[2])[1]
  if not oldest then break end
  redis.call('DECRBY', KEYS[4], redis.call('HSTRLEN', KEYS[1], oldest))
  redis.call('HDEL', KEYS[1], oldest)
end
return 1
