//! Longspan on CPUs.
