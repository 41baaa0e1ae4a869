//! Huawei Ascend.
