-- Deletes operator requests, and their dead letters where asked.
-- Fenced. KEYS: epoch, requests, dead. ARGV: epoch, then per request its id and the id of the dead
-- letter to delete, '' for none.
-- Safe to repeat: deletes only, so a full Redis takes it too.
for i = 2, #ARGV, 2 do
  redis.call('XDEL', KEYS[2], ARGV[i])
  if ARGV[i + 1] ~= '' then redis.call('XDEL', KEYS[3], ARGV[i + 1]) end
end
return 1
