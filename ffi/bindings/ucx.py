#!/usr/bin/env python3
"""Makes ffi/src/ucx/bindings.rs from the public headers of UCX.

Usage: bindings/ucx.py INCLUDE_DIR

INCLUDE_DIR holds ucp/api/ucp.h of the oldest version that the loader accepts (1.13: Debian's
libucx-dev). Needs bindgen (cargo install bindgen-cli --version 0.71.1) and the libclang that
bindgen needs; neither is needed to build the project.

The functions become one table of pointers, filled at run time; enumerations become integers, so
that a value which a newer library adds is no undefined behaviour.
"""

import pathlib
import re
import subprocess
import sys

FUNCTIONS = """
ucp_get_version ucp_config_read ucp_config_modify ucp_config_release ucp_init_version ucp_cleanup
ucp_worker_create ucp_worker_destroy ucp_worker_query ucp_worker_get_address
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
UCP_MEM_MAP_PARAM_FIELD_(ADDRESS|LENGTH|PROT|MEMORY_TYPE)
UCP_MEM_MAP_PROT_(LOCAL|REMOTE)_(READ|WRITE)
""".split()

HEADER = """//! Types, values and functions of libucp, made by `bindings/ucx.py`: do not edit.

"""


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    include = sys.argv[1]
    raw = subprocess.run(
        ["bindgen", f"{include}/ucp/api/ucp.h", "--default-enum-style=consts",
         "--no-prepend-enum-name", "--no-doc-comments", "--ctypes-prefix=libc",
         "--blocklist-type=FILE|_IO_.*", "--raw-line=use super::functions;\nuse libc::FILE;",
         "--rust-edition=2024", "--rust-target=1.85", "--merge-extern-blocks", "--no-layout-tests",
         "--allowlist-function", "|".join(FUNCTIONS), "--allowlist-type", "|".join(TYPES),
         "--allowlist-var", "|".join(VALUES), "--", f"-I{include}"],
        check=True, stdout=subprocess.PIPE, text=True).stdout
    kept, pointers = [], []
    extern = False
    for item in re.split(r"\n(?=pub |#\[|unsafe extern|use )", raw):
        if item.startswith("unsafe extern"):
            for function in re.findall(r"pub fn (\w+)\((.*?)\)(?: -> (.*?))?;", item, re.S):
                name, arguments, returns = function
                types = [argument.split(":", 1)[1] for argument
                         in re.split(r",\s*(?=\w+: )", arguments) if ":" in argument]
                types = [" ".join(t.split()).rstrip(",") for t in types]
                returns = f" -> {' '.join(returns.split())}" if returns else ""
                pointers.append((name, f"unsafe extern \"C\" fn({', '.join(types)}){returns}"))
        else:
            kept.append(item)
    missing = set(FUNCTIONS) - {name for name, _ in pointers}
    if missing:
        sys.exit(f"not in the headers: {sorted(missing)}")
    wanted = re.compile("|".join(f"(?:{value})" for value in VALUES))
    body = [i for i in kept
            if not re.match(r"pub const \w+: ", i)
            or wanted.fullmatch(re.match(r"pub const (\w+)", i).group(1))]
    text = HEADER + re.sub(r"/\* automatically generated.*?\*/\n", "", "\n".join(body))
    text += "\n\nfunctions! {\n" + "".join(f"    {n}: {t},\n" for n, t in pointers) + "}\n"
    out = pathlib.Path(__file__).resolve().parent.parent / "src/ucx/bindings.rs"
    out.write_text(text)
    subprocess.run(["rustfmt", "--edition", "2024", str(out)], check=True)


main()
