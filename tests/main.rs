//! The daemon as its users meet it: real brokers, real clients, real models, one module a behaviour.
//!
//! Needs `mosquitto` and `mosquitto-clients`; `conformance` needs `python3` with `venv`, and PyPI the first time. The
//! closed models are the labelled stand-in.

#[allow(dead_code)] // shared with the load generator
mod common;

mod bad_input;
mod better;
mod brokers;
mod calibrate;
mod commands;
mod conformance;
mod duplicates;
mod fallback;
mod flow;
mod models;
mod money;
mod overload;
mod providers;
mod reconnect;
mod shutdown;
mod uplink;
