//! Which vector unit the arithmetic runs on.

use crate::Error;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// Environment variable that forces a kernel for the whole process, for tests and measurements.
pub const KERNEL_VARIABLE: &str = "XSAN_ERASURE_KERNEL";

/// An implementation of the arithmetic. All give the same bytes; they differ in speed and in what they need.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kernel {
    /// x86-64 with GFNI and AVX-512 (F, BW).
    Gfni512,
    /// x86-64 with GFNI and AVX2.
    Gfni256,
    /// x86-64 with AVX2.
    Avx2,
    /// x86-64 with SSSE3.
    Ssse3,
    /// AArch64 with Advanced SIMD.
    Neon,
    /// Any processor.
    Scalar,
}

impl Kernel {
    /// Every kernel, the preferred one first.
    pub const ALL: [Self; 6] = [Self::Gfni512, Self::Gfni256, Self::Avx2, Self::Ssse3, Self::Neon, Self::Scalar];

    /// The kernels this processor can run, the preferred one first; never empty, the last one is [`Kernel::Scalar`].
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|kernel| kernel.is_available())
    }

    /// Whether this processor can run it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Gfni512 => {
                is_x86_feature_detected!("gfni")
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Gfni256 => is_x86_feature_detected!("gfni") && is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Self::Ssse3 => is_x86_feature_detected!("ssse3"),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            Self::Scalar => true,
            #[allow(unreachable_patterns)] // Which kernels are left depends on the architecture.
            _ => false,
        }
    }

    /// The kernel of this process: the one [`KERNEL_VARIABLE`] names, else the preferred available one. Decided at the
    /// first call, then fixed.
    ///
    /// # Errors
    /// [`Error::KernelUnknown`] or [`Error::KernelUnsupported`] if the variable is set to something that cannot be had.
    pub fn chosen() -> Result<Self, Error> {
        static CHOSEN: OnceLock<Result<Kernel, Error>> = OnceLock::new();
        *CHOSEN.get_or_init(|| Self::choose(std::env::var_os(KERNEL_VARIABLE).as_deref()))
    }

    fn choose(forced: Option<&std::ffi::OsStr>) -> Result<Self, Error> {
        match forced {
            Some(text) => {
                let kernel = text.to_str().ok_or(Error::KernelUnknown)?.parse()?;
                Usable::check(kernel).map(Usable::kernel)
            }
            None => Ok(Self::available().next().unwrap_or(Self::Scalar)),
        }
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Gfni512 => "gfni512",
            Self::Gfni256 => "gfni256",
            Self::Avx2 => "avx2",
            Self::Ssse3 => "ssse3",
            Self::Neon => "neon",
            Self::Scalar => "scalar",
        })
    }
}

impl FromStr for Kernel {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::ALL.into_iter().find(|kernel| kernel.to_string() == text).ok_or(Error::KernelUnknown)
    }
}

/// Proof that this processor can run a kernel: the only way to run one, and made only by asking the processor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usable(Kernel);

impl Usable {
    pub(crate) fn check(kernel: Kernel) -> Result<Self, Error> {
        if kernel.is_available() { Ok(Self(kernel)) } else { Err(Error::KernelUnsupported { kernel }) }
    }

    pub(crate) fn kernel(self) -> Kernel {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_kernel_is_taken_or_refused_but_never_replaced() {
        for kernel in Kernel::ALL {
            let expected = if kernel.is_available() { Ok(kernel) } else { Err(Error::KernelUnsupported { kernel }) };
            assert_eq!(Kernel::choose(Some(kernel.to_string().as_ref())), expected);
        }
        for wrong in ["", "AVX2", "avx512", "scalar "] {
            assert_eq!(Kernel::choose(Some(wrong.as_ref())), Err(Error::KernelUnknown), "{wrong:?}");
        }
    }

    #[test]
    fn without_force_the_preferred_available_kernel_runs() {
        assert_eq!(Kernel::choose(None).ok(), Kernel::available().next());
        assert_eq!(Kernel::available().last(), Some(Kernel::Scalar));
    }
}
