-- Makes a policy version the newest, and announces it.
-- Fenced. KEYS: epoch, policy, policies, announced. ARGV: epoch, payload, how many announcements are
-- kept, the version's number.
-- Returns 1, or 0 when it was the newest already.
-- Safe to repeat: the newest version is not announced again. DEL comes first and frees memory, for
-- a full Redis. The greatest number stays where a trainer went back to a checkpoint.
local greatest = tonumber(redis.call('GET', KEYS[4]) or '') or -1
if greatest < tonumber(ARGV[4]) then
  redis.call('DEL', KEYS[4])
  redis.call('SET', KEYS[4], ARGV[4])
end
if redis.call('GET', KEYS[2]) == ARGV[2] then return 0 end
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], ARGV[2])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'b', ARGV[2])
return 1
