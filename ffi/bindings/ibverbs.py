#!/usr/bin/env python3
"""Makes ffi/src/ibverbs/bindings.rs from the public headers of libibverbs.

Usage: bindings/ibverbs.py INCLUDE_DIR

INCLUDE_DIR holds infiniband/verbs.h (Debian: libibverbs-dev). What posts and polls is inline in
the headers and goes through a context's table of operations, which is part of the bindings.
"""

import sys

from table import make

FUNCTIONS = """
ibv_get_device_list ibv_free_device_list ibv_get_device_name ibv_open_device ibv_close_device
ibv_query_device ibv_query_port ibv_query_gid ibv_alloc_pd ibv_dealloc_pd ibv_reg_mr ibv_dereg_mr
ibv_create_comp_channel ibv_destroy_comp_channel ibv_create_cq ibv_destroy_cq ibv_get_cq_event
ibv_ack_cq_events ibv_create_qp ibv_modify_qp ibv_destroy_qp ibv_get_async_event
ibv_ack_async_event ibv_fork_init ibv_wc_status_str ibv_port_state_str ibv_event_type_str
""".split()

TYPES = "ibv_port_attr ibv_access_flags ibv_send_flags ibv_qp_attr_mask".split()

VALUES = """
IBV_ACCESS_(LOCAL_WRITE|REMOTE_READ|REMOTE_WRITE|RELAXED_ORDERING) IBV_SEND_(SIGNALED|INLINE)
IBV_QPT_RC IBV_QPS_(RESET|INIT|RTR|RTS|ERR)
IBV_QP_(STATE|PKEY_INDEX|PORT|ACCESS_FLAGS|AV|PATH_MTU|DEST_QPN|RQ_PSN|SQ_PSN|TIMEOUT|RETRY_CNT)
IBV_QP_(RNR_RETRY|MAX_QP_RD_ATOMIC|MAX_DEST_RD_ATOMIC|MIN_RNR_TIMER)
IBV_WR_(SEND|RDMA_READ|RDMA_WRITE) IBV_WC_.* IBV_EVENT_.* IBV_PORT_.* IBV_LINK_LAYER_.* IBV_MTU_.*
""".split()

OPTIONS = ["--blocklist-type=pthread_mutex_t|pthread_cond_t|__pthread.*|__atomic.*",
           "--blocklist-type=timespec", "--opaque-type=ibv_async_event__bindgen_ty_1",
           "--no-debug=ibv_async_event",
           "--raw-line=use super::functions;\nuse libc::{pthread_cond_t, pthread_mutex_t};"]

if len(sys.argv) != 2:
    sys.exit(__doc__)
make("ibverbs", sys.argv[1], "infiniband/verbs.h", FUNCTIONS, TYPES, VALUES, OPTIONS)
