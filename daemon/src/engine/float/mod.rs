//! Small convolutional networks in floats: between tract's decluttering and its optimisation, pieces of the graph
//! become programs of our own, channels last, with padding in the buffers and activations in the layers.
//!
//! ```text
//! rewrite   which nodes belong together; they become one operator
//! lower     those nodes → a program
//! program   steps over buffers; what runs
//! kernel    what the processor has for each step
//! ```

pub mod kernel;
pub mod lower;
pub mod program;
pub mod rewrite;

#[cfg(test)]
mod tests;

pub use rewrite::rewrite;
