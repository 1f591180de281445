#!/usr/bin/env python3
"""Makes ffi/src/ucx/bindings.rs from the public headers of UCX.

Usage: bindings/ucx.py INCLUDE_DIR

INCLUDE_DIR holds ucp/api/ucp.h of the oldest version that the loader accepts (1.13: Debian's
libucx-dev).
"""

import sys

from table import make

FUNCTIONS = """
ucp_get_version ucp_config_read ucp_config_modify ucp_config_release ucp_init_version ucp_cleanup
ucp_context_print_info ucp_worker_create ucp_worker_destroy ucp_worker_query ucp_worker_get_address
ucp_worker_release_address ucp_worker_progress ucp_worker_get_efd ucp_worker_arm
ucp_worker_set_am_recv_handler ucp_ep_create ucp_ep_close_nbx ucp_ep_print_info ucp_ep_flush_nbx
ucp_am_send_nbx ucp_am_recv_data_nbx ucp_am_data_release ucp_request_free ucp_request_cancel
ucp_mem_map ucp_mem_unmap ucp_rkey_pack ucp_rkey_buffer_release ucp_ep_rkey_unpack
ucp_rkey_destroy ucp_put_nbx ucp_get_nbx ucs_status_string
""".split()

TYPES = """
ucp_dt_iov_t ucp_am_recv_param_t ucp_err_handler_cb_t ucp_am_recv_callback_t
ucp_send_nbx_callback_t ucp_am_recv_data_nbx_callback_t
ucp_params_field ucp_feature ucp_worker_params_field ucp_worker_attr_field ucp_ep_params_field
ucp_ep_params_flags_field ucp_ep_close_flags_t ucp_op_attr_t ucp_send_am_flags ucp_am_recv_attr_t
ucp_am_handler_param_field ucp_dt_type ucp_mem_map_params_field
""".split()

VALUES = """
UCS_OK UCS_INPROGRESS UCS_ERR_.* UCS_MEMORY_TYPE_HOST UCS_THREAD_MODE_SERIALIZED
UCP_PARAM_FIELD_(FEATURES|NAME) UCP_FEATURE_(AM|RMA|WAKEUP) UCP_WORKER_PARAM_FIELD_THREAD_MODE
UCP_WORKER_ATTR_FIELD_MAX_AM_HEADER
UCP_EP_PARAM_FIELD_(REMOTE_ADDRESS|ERR_HANDLING_MODE|ERR_HANDLER|FLAGS)
UCP_EP_PARAMS_FLAGS_NO_LOOPBACK UCP_ERR_HANDLING_MODE_PEER UCP_EP_CLOSE_FLAG_FORCE
UCP_OP_ATTR_FIELD_(CALLBACK|USER_DATA|DATATYPE|FLAGS|MEMORY_TYPE|MEMH)
UCP_AM_SEND_FLAG_(EAGER|RNDV) UCP_AM_RECV_ATTR_FLAG_(DATA|RNDV)
UCP_AM_HANDLER_PARAM_FIELD_(ID|CB|ARG) UCP_DATATYPE_IOV
UCP_MEM_MAP_PARAM_FIELD_(ADDRESS|LENGTH|MEMORY_TYPE)
""".split()

OPTIONS = ["--blocklist-type=FILE|_IO_.*", "--raw-line=use super::functions;\nuse libc::FILE;"]

if len(sys.argv) != 2:
    sys.exit(__doc__)
make("ucx", sys.argv[1], "ucp/api/ucp.h", FUNCTIONS, TYPES, VALUES, OPTIONS)
