-- Sets a key.
-- Fenced. KEYS: epoch, key. ARGV: epoch, value.
-- Safe to repeat: the same value. DEL comes first and frees memory, for a full Redis.
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], ARGV[2])
return 1
