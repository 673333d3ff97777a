-- Deletes entries of the trainer's stream, which have settled and are durable, and lets go of
-- the images that their numbers hold.
-- Fenced; needs release(). KEYS: epoch, stream, images:held, images:counted, images.
-- ARGV: epoch, group, then per entry its id and number.
-- Returns how many entries were there.
-- Safe to repeat: a second run finds no entries, and images go only with their entry. XACK comes
-- first and frees memory: a full Redis takes it.
local done, holds = 0, redis.call('EXISTS', KEYS[3]) == 1
for i = 3, #ARGV, 2 do
  redis.call('XACK', KEYS[2], ARGV[2], ARGV[i])
  if redis.call('XDEL', KEYS[2], ARGV[i]) == 1 then
    done = done + 1
    if holds then release(KEYS[3], KEYS[4], KEYS[5], ARGV[i + 1]) end
  end
end
return done
