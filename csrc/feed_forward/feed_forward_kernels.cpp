// The feed-forward block, for one instruction set.
#include "feed_forward/feed_forward.h"

#include "cpu_isa_begin.h"

#include "feed_forward/feed_forward_kernels.h"

QFAST_BOTH_TYPES(feed_forward)
QFAST_BOTH_TYPES(feed_forward_backward)

#include "cpu_isa_end.h"
