-- Deletes a key.
-- Fenced. KEYS: epoch, key. ARGV: epoch.
-- Safe to repeat: deletes only, so a full Redis takes it too.
return redis.call('DEL', KEYS[2])
