-- Writes one chunk of weights. Its place is noted first, so that one that is never finished can be
-- found and deleted.
-- Fenced. KEYS: epoch, weights:places, the chunks of the place. ARGV: epoch, place, index, chunk.
-- Safe to repeat: the same values. A full Redis refuses the first write; the caller makes room.
redis.call('SADD', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
return 1
