//! Quantized models as integers: between reading an ONNX graph and optimising it, what is quantized is cut out
//! and lowered to programs of our own.
//!
//! ```text
//! rewrite   which nodes belong together; they become one node
//! lower     those nodes, for inputs of known shape → a program
//! program   steps over buffers; what runs
//! kernel    what the processor has for each step
//! operator  a program, as tract sees it
//! ```

pub mod kernel;
pub mod lower;
pub mod operator;
pub mod program;
pub mod rewrite;

pub use rewrite::load;
