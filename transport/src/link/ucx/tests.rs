//! Tests of the link over the libucp that is here, if one is.
