-- The epoch fence: prepended to every script that only the trainer may run.
-- KEYS[1]: epoch. ARGV[1]: the caller's epoch.
-- Errors: LEASELOST when a later trainer has raised the epoch; DATALOST when Redis knows only a
-- lower one, because it has lost data. Nothing is written in either case.
local epoch = redis.call('GET', KEYS[1])
if tonumber(epoch or 0) < tonumber(ARGV[1]) then
  return redis.error_reply('DATALOST epoch ' .. ARGV[1] .. ' is not known')
end
if epoch ~= ARGV[1] then
  return redis.error_reply('LEASELOST epoch ' .. ARGV[1] .. ' was followed by ' .. tostring(epoch))
end
