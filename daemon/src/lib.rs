//! Outpost: jobs in over MQTT, answered on the device or by a closed model, replies out.
//!
//! The modules stand in the order of a job's way; `README.md` beside this crate draws it.

pub mod app;
pub mod cli;
pub mod config;
pub mod keys;
pub mod secret;

pub mod job;
pub mod topic;

pub mod intake;

pub mod admit;

pub mod dispatch;
pub mod facts;
pub mod route;

pub mod engine;
pub mod task;

pub mod calibrate;

pub mod hold;
pub mod uplink;

pub mod reply;
pub mod store;

#[cfg(feature = "systemd")]
pub mod journal;
pub mod status;
pub mod systemd;
pub mod vitals;

pub mod check;
pub mod demo;
pub mod models;
pub mod submit;

#[cfg(feature = "broker")]
pub mod broker;
pub mod standin;
