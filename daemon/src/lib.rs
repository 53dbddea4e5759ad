//! Outpost: jobs in over MQTT, answered on the device or by a closed model, replies out.
//!
//! The modules stand in the order of a job's way; `README.md` beside this crate draws it.




pub mod config;

pub mod keys;


pub mod job;
pub mod topic;

pub mod intake;





pub mod engine;
pub mod task;

pub mod uplink;








