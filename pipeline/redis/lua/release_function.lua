-- release(): deletes what one number holds of images, and each image that no other number holds.
-- Prepended to the scripts that let images go.
-- Safe to repeat: the second run finds no digests under the number and does nothing. Its first
-- write is HDEL, which frees memory, so a full Redis takes it.
local function release(held, counts, images, number)
  local digests = redis.call('HGET', held, number)
  if not digests then return end
  redis.call('HDEL', held, number)
  for digest in string.gmatch(digests, '%S+') do
    if redis.call('HINCRBY', counts, digest, -1) <= 0 then
      redis.call('HDEL', counts, digest)
      redis.call('HDEL', images, digest)
    end
  end
end
