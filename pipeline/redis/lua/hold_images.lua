-- Counts numbers as holders of their images, each once, while its entry is in somebody's hands.
-- KEYS: stream, images:held, images:counted, images.
-- ARGV: group, how many images are sent along, their digests and bytes in turn, then per entry: its
-- id, its number, how many images it needs, their digests.
-- Returns, per entry: 1 when its images are held; 0 when the entry is not pending any more; or the
-- digests whose bytes must be sent first.
-- Safe to repeat: a digest that the number holds already is not counted again. A full Redis may
-- refuse a call before its first write; the caller waits and repeats it.
local brought, replies, at = {}, {}, 3 + 2 * tonumber(ARGV[2])
for i = 3, at - 1, 2 do brought[ARGV[i]] = ARGV[i + 1] end
local function missing(first, last)
  local found = {}
  for i = first, last do
    if not brought[ARGV[i]] and redis.call('HEXISTS', KEYS[4], ARGV[i]) == 0 then
      found[#found + 1] = ARGV[i]
    end
  end
  return found
end
local function hold(number, first, last)
  local before = redis.call('HGET', KEYS[2], number) or ''
  local held = before
  for i = first, last do
    if not string.find(held, ARGV[i], 1, true) then
      if brought[ARGV[i]] then redis.call('HSETNX', KEYS[4], ARGV[i], brought[ARGV[i]]) end
      redis.call('HINCRBY', KEYS[3], ARGV[i], 1)
      held = held .. ' ' .. ARGV[i]
    end
  end
  if held ~= before then redis.call('HSET', KEYS[2], number, held) end
end
while at <= #ARGV do
  local id, number, first = ARGV[at], ARGV[at + 1], at + 3
  local last = first + tonumber(ARGV[at + 2]) - 1
  local reply = 0
  if #redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1) == 1 then
    local wanted = missing(first, last)
    reply = #wanted > 0 and wanted or 1
    if reply == 1 then hold(number, first, last) end
  end
  replies[#replies + 1] = reply
  at = last + 1
end
return replies
