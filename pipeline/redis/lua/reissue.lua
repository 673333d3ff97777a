-- Issues lost numbers again, once for each token.
-- Fenced. KEYS: epoch, ready, reissued, tickets. ARGV: epoch, number of stages that must be ready,
-- token, then those stages, then per ticket its number and payload.
-- Returns 1 when the tickets stand issued, or the stages that are not ready.
-- Safe to repeat: a second run finds the token and writes nothing. SADD is the first write; a full
-- Redis refuses it, and with it the whole call.
local first = 4 + tonumber(ARGV[2])
local awaited = missing(KEYS[2], 4, first - 1)
if #awaited > 0 then return awaited end
if redis.call('SADD', KEYS[3], ARGV[3]) == 1 then
  for i = first, #ARGV, 2 do redis.call('XADD', KEYS[4], '*', 'n', ARGV[i], 'b', ARGV[i + 1]) end
end
return 1
