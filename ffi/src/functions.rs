//! A library's functions as one table of pointers: what the committed bindings end in.

macro_rules! functions {
    ($($name:ident: $type:ty,)*) => {
        /// The functions of the loaded library.
        #[derive(Clone, Copy, Debug)]
        #[allow(missing_docs, reason = "named by the library, whose documentation it is")]
        pub struct Functions {
            $(pub $name: $type,)*
        }

        impl Functions {
            /// `Err`: the name of one that is missing.
            pub(super) fn load(library: crate::dl::Library) -> Result<Functions, &'static str> {
                Ok(Functions {
                    $($name: {
                        let name = const {
                            match std::ffi::CStr::from_bytes_with_nul(
                                concat!(stringify!($name), "\0").as_bytes(),
                            ) {
                                Ok(name) => name,
                                Err(_) => panic!("a name with a zero byte"),
                            }
                        };
                        let Some(address) = library.symbol(name) else {
                            return Err(stringify!($name));
                        };
                        // SAFETY: the public headers declare a function of this name and type, and
                        // the library was found to be of their kind.
                        unsafe { std::mem::transmute::<*mut libc::c_void, $type>(address) }
                    },)*
                })
            }
        }
    };
}
pub(crate) use functions;
