//! Models on the device: packages are loaded, proven on their golden cases, and run on own threads.

pub mod float;
pub mod load;
pub mod measure;
pub mod meter;
pub mod model;
pub mod pace;
pub mod package;
pub mod quant;
pub mod registry;
pub mod shelf;
pub mod worker;

pub use model::Model;
pub use registry::Registry;
pub use shelf::Shelf;
pub use worker::Pool;

/// Instruction set of the integer kernels that this processor runs.
pub fn kernels() -> &'static str {
    quant::kernel::best().name
}

/// SIMD features of this processor that the kernels can use, by their names in `/proc/cpuinfo` style.
#[cfg_attr(
    not(any(target_arch = "aarch64", target_arch = "x86_64")),
    expect(unused_mut, unused_macros, reason = "no kernels of ours for this architecture yet")
)]
pub fn simd() -> Vec<&'static str> {
    let mut found = Vec::new();
    macro_rules! look {
        ($detected:ident: $($feature:tt),*) => { $( if std::arch::$detected!($feature) { found.push($feature); } )* };
    }
    #[cfg(target_arch = "aarch64")]
    look!(is_aarch64_feature_detected: "neon", "dotprod", "i8mm", "fp16", "sve");
    #[cfg(target_arch = "x86_64")]
    look!(is_x86_feature_detected: "sse4.1", "avx2", "fma", "avxvnni", "avx512f", "avx512vnni");
    found
}
