-- Looks scores up, and marks those that are there as used now.
-- KEYS: scores, used, clock. ARGV: digests.
-- Returns, per digest: the scores or false.
-- Safe to repeat: the marks only order what is forgotten first. pcall lets a full Redis, which
-- takes no marks, still answer.
local found = {}
for i = 1, #ARGV do
  local value = redis.call('HGET', KEYS[1], ARGV[i])
  found[i] = value
  local now = value and redis.pcall('INCR', KEYS[3])
  if type(now) == 'number' then redis.pcall('ZADD', KEYS[2], 'XX', now, ARGV[i]) end
end
return found
