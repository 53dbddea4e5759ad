//! Quantized models as integers: between reading an ONNX graph and optimising it, what is quantized is cut out
//! and lowered to programs of our own.
//!
//! ```text
//! normal    one form for what quantized graphs say in several
//! rewrite   which nodes belong together; they become one node
//! lower     those nodes, for inputs of known shape → a program
//! program   steps over buffers; what runs
//! kernel    what the processor has for each step
//! operator  a program, as tract sees it
//! plain     quantizing and dequantizing, where tract does it
//! ```

pub mod kernel;
pub mod lower;
pub mod normal;
pub mod operator;
pub mod plain;
pub mod program;
pub mod rewrite;

pub use rewrite::load;
