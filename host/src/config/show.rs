//! The checked settings as names and values, for `system.settings`. Secrets are shown as being there, no more.

use std::fmt::Display;
use std::time::Duration;

use super::{Config, LogFormat};

impl Config {
    /// Every setting by its full name, as it is in effect.
    pub fn settings(&self) -> Vec<(String, String)> {
        let mut list = List { prefix: "", rows: Vec::new() };
        list.put("data_dir", self.data_dir.display());
        list.put("admin_token", if self.admin_token.is_some() { "(set)" } else { "(in the data directory)" });
        list.put("tokens", format!("({} of them)", self.tokens.len()));
        self.server(&mut list);
        self.storage(&mut list);
        self.queries(&mut list);
        self.streams(&mut list);
        self.modules(&mut list);
        list.prefix = "log";
        list.put("format", if self.log_format == LogFormat::Json { "json" } else { "text" });
        list.put("filter", &self.log_filter);
        list.rows
    }

    fn server(&self, list: &mut List) {
        list.prefix = "server";
        let http = &self.http;
        list.put("bind", http.bind);
        list.put("insecure_http", http.insecure_http);
        list.put("max_connections", http.max_connections);
        list.millis("header_timeout_ms", http.header_timeout);
        list.put("body_bytes", http.body_bytes);
        list.put("plugin_body_bytes", http.plugin_body_bytes);
        list.put("body_total_bytes", http.body_total_bytes);
        list.millis("ticket_ttl_ms", http.ticket_ttl);
    }

    fn storage(&self, list: &mut List) {
        list.prefix = "storage";
        let store = &self.store;
        list.put("durability", store.durability.as_str());
        list.millis("sync_interval_ms", store.sync_interval);
        list.put("max_commit_bytes", store.max_commit_bytes);
        list.put("write_queue", store.write_queue);
        list.put("log_commits", store.log_commits);
        list.put("log_bytes", store.log_bytes);
        list.millis("log_age_ms", store.log_age);
        list.millis("idempotency_age_ms", store.idempotency_age);
        list.prefix = "storage.rocksdb";
        list.put("write_buffer_size", store.write_buffer_size);
        list.put("max_write_buffers", store.max_write_buffers);
        list.put("block_cache_size", store.block_cache_size);
        list.put("max_background_jobs", store.max_background_jobs);
        list.put("max_open_files", store.max_open_files);
    }

    fn queries(&self, list: &mut List) {
        list.prefix = "sql";
        let sql = &self.sql;
        list.put("memory_bytes", sql.memory_bytes);
        list.put("spill_bytes", sql.spill_bytes);
        list.millis("deadline_ms", sql.deadline);
        list.put("batch_rows", sql.batch_rows);
        list.put("target_partitions", sql.target_partitions);
        list.put("plan_cache_bytes", sql.plan_cache_bytes);
        list.put("heavy_queries", sql.heavy_queries);
        list.put("heavy_queue", sql.heavy_queue);
    }

    fn streams(&self, list: &mut List) {
        list.prefix = "live";
        let live = &self.live;
        list.millis("heartbeat_ms", live.heartbeat);
        list.millis("stall_limit_ms", self.http.stall_limit);
        list.put("commit_tail_bytes", live.commit_tail_bytes);
        list.put("group_tail_bytes", live.group_tail_bytes);
        list.put("chunk_bytes", live.chunk_bytes);
        list.put("max_subscriptions", live.max_subscriptions);
        list.put("max_per_user", live.max_per_user);
        list.put("max_per_address", live.max_per_address);
        list.millis("requery_interval_ms", live.requery_interval);
        list.put("requery_bytes", live.requery_bytes);
        list.put("requery_runs", live.requery_runs);
    }

    fn modules(&self, list: &mut List) {
        list.prefix = "plugins";
        let plugins = &self.plugins;
        list.put("ring_bytes", plugins.ring_bytes);
        list.put("worker_bytes", plugins.worker_bytes);
        list.put("workers", plugins.workers);
        list.put("instances_per_worker", plugins.instances_per_worker);
        list.put("module_bytes", plugins.module_bytes);
        list.put("memory_bytes", plugins.memory_bytes);
        list.put("stack_bytes", plugins.stack_bytes);
        list.put("table_elements", plugins.table_elements);
        list.millis("batch_ms", plugins.batch_time);
        list.millis("init_ms", plugins.init_time);
        list.millis("compile_ms", plugins.compile_time);
        list.put("output_bytes", plugins.output_bytes);
        list.put("log_bytes", plugins.log_bytes);
        list.put("drop_instances_seed", plugins.drop_instances_seed);
    }
}

struct List {
    /// The section that follows.
    prefix: &'static str,
    rows: Vec<(String, String)>,
}

impl List {
    fn put(&mut self, name: &str, value: impl Display) {
        let name = if self.prefix.is_empty() { name.to_owned() } else { format!("{}.{name}", self.prefix) };
        self.rows.push((name, value.to_string()));
    }

    fn millis(&mut self, name: &str, value: Duration) {
        self.put(name, value.as_millis());
    }
}
