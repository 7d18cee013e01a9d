"""What outlives a block's KV: enough to encode it again. A table on this machine, and a mirror that workers share."""
