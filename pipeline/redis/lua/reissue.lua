-- Issues lost numbers again, once for each token.
-- Fenced. KEYS: epoch, reissued, tickets. ARGV: epoch, token, then per ticket its number and
-- payload.
-- Safe to repeat: a second run finds the token and writes nothing. SADD is the first write; a full
-- Redis refuses it, and with it the whole call.
if redis.call('SADD', KEYS[2], ARGV[2]) == 1 then
  for i = 3, #ARGV, 2 do redis.call('XADD', KEYS[3], '*', 'n', ARGV[i], 'b', ARGV[i + 1]) end
end
return 1
