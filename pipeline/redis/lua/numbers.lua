-- Lists the numbers of a stream's entries, without sending their payloads to the client.
-- KEYS: stream. ARGV: first id, how many entries.
-- Returns the last id that was read ('' for none) and the numbers.
-- Safe to repeat: reads only.
local numbers, last = {}, ''
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], '+', 'COUNT', ARGV[2])) do
  last = entry[1]
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'n' then numbers[#numbers + 1] = entry[2][i + 1] end
  end
end
return {last, numbers}
