//! Longspan on CPUs.

mod attention;
