-- Raises the count of issued tickets, where it is lower or missing: the run begins, or Redis has
-- lost data.
-- Fenced. KEYS: epoch, issued. ARGV: epoch, count.
-- Returns the count.
-- Safe to repeat: a maximum. DEL comes first and frees memory, for a full Redis.
local count = tonumber(redis.call('GET', KEYS[2]) or '') or -1
if count < tonumber(ARGV[2]) then
  redis.call('DEL', KEYS[2])
  redis.call('SET', KEYS[2], ARGV[2])
end
return tonumber(redis.call('GET', KEYS[2]) or 0)
