-- Writes fields of a hash.
-- Fenced. KEYS: epoch, hash. ARGV: epoch, field, value, …
-- Safe to repeat: the same values. HDEL comes first and frees memory, for a full Redis.
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HSET', KEYS[2], unpack(ARGV, 2))
return 1
