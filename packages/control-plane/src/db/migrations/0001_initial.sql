-- The whole first schema. Applied migrations are never edited.
--
-- Every row belongs to a team, but for the cluster's own and shared hosts.
-- Times are kept to the millisecond, as JSON and cursors carry them.

create table cluster (
  singleton boolean primary key default true check (singleton),
  id text not null,
  -- Secrets of the cluster, sealed with the key from the environment.
  sealed_secrets bytea not null,
  -- When any replica last could have received heartbeats, and since when
  -- without a gap: no host is given up right after an outage of ours.
  receptive_at timestamptz(3) not null default now(),
  receptive_since timestamptz(3) not null default now(),
  created_at timestamptz(3) not null default now()
);

create table teams (
  id text primary key,
  name text not null unique,
  -- null: the configured default.
  max_sandboxes integer check (max_sandboxes >= 0),
  -- Sandboxes that are not final; moved in the same statement as they are.
  live_sandboxes integer not null default 0 check (live_sandboxes >= 0),
  created_at timestamptz(3) not null default now()
) with (fillfactor = 50);
create index teams_newest on teams (created_at desc, id desc);

create table api_keys (
  id text primary key,
  team_id text not null references teams on delete cascade,
  name text not null,
  role text not null check (role in ('member', 'platform')),
  key_hash bytea not null unique check (length(key_hash) = 32),
  prefix text not null,
  created_at timestamptz(3) not null default now(),
  last_used_at timestamptz(3)
);
create index api_keys_newest on api_keys (team_id, created_at desc, id desc);

create table hosts (
  id text primary key,
  name text not null,
  type text not null check (type in ('shared', 'byoc')),
  team_id text references teams,
  -- Liveness and draining are two things: a draining host may go silent and return.
  status text not null default 'pending' check (status in ('pending', 'online', 'unreachable')),
  draining boolean not null default false,
  labels jsonb not null default '{}',
  -- What it said when it registered.
  address text,
  certificate_fingerprint text,
  public_key text,
  arch text,
  cpus integer,
  memory_mb integer,
  disk_mb integer,
  drivers jsonb,
  version text,
  -- Access tokens of another epoch are refused.
  epoch integer not null default 0,
  -- What it said in its last heartbeat.
  load jsonb,
  digest text,
  last_heartbeat_at timestamptz(3),
  -- Its log of events, and how far it was read.
  event_log_id text,
  acknowledged_event bigint not null default 0,
  event_reader text,
  event_reader_until timestamptz(3),
  next_check_at timestamptz(3) not null default now(),
  created_at timestamptz(3) not null default now(),
  check ((type = 'byoc') = (team_id is not null)),
  check ((status = 'pending') or (address is not null and arch is not null and cpus is not null
    and memory_mb is not null and disk_mb is not null and drivers is not null and version is not null
    and last_heartbeat_at is not null))
) with (fillfactor = 50);
create index hosts_newest on hosts (created_at desc, id desc);
create index hosts_by_team on hosts (team_id, created_at desc, id desc) where team_id is not null;
create index hosts_due on hosts (next_check_at) where status <> 'pending';

-- One registration token per host: a new one replaces it, its use deletes it.
create table host_registration_tokens (
  host_id text primary key references hosts on delete cascade,
  token_hash bytea not null unique check (length(token_hash) = 32),
  expires_at timestamptz(3) not null
);

-- A host's tokens are one family: registering anew and theft delete them all.
create table host_refresh_tokens (
  token_hash bytea primary key check (length(token_hash) = 32),
  host_id text not null references hosts on delete cascade,
  -- The token that it was given for; null: its registration's first.
  parent_hash bytea references host_refresh_tokens on delete set null,
  used_at timestamptz(3),
  created_at timestamptz(3) not null default now(),
  expires_at timestamptz(3) not null
);
create index host_refresh_tokens_by_host on host_refresh_tokens (host_id);
create index host_refresh_tokens_by_parent on host_refresh_tokens (parent_hash);

create table templates (
  id text primary key,
  name text not null unique,
  vcpus integer not null,
  memory_mb integer not null,
  disk_mb integer not null,
  created_at timestamptz(3) not null default now()
);
insert into templates (id, name, vcpus, memory_mb, disk_mb)
values ('tpl-base0000000000000000', 'base', 1, 512, 4096);

create table snapshots (
  id text primary key,
  team_id text not null references teams,
  name text not null,
  host_id text not null references hosts,
  status text not null check (status in ('creating', 'ready', 'deleting')),
  vcpus integer not null,
  memory_mb integer not null,
  disk_mb integer not null,
  size_bytes bigint not null default 0,
  operation_deadline timestamptz(3),
  created_at timestamptz(3) not null default now(),
  check ((status = 'ready') = (operation_deadline is null))
);
-- The name belongs to the one that is ready: a replacement takes it over at its end.
create unique index snapshots_name on snapshots (team_id, name) where status = 'ready';
create index snapshots_newest on snapshots (team_id, created_at desc, id desc) where status = 'ready';
create index snapshots_overdue on snapshots (operation_deadline) where operation_deadline is not null;
create index snapshots_by_host on snapshots (host_id, id);

create table sandboxes (
  id text primary key,
  team_id text not null references teams,
  status text not null check (status in ('pending', 'starting', 'running', 'pausing', 'paused',
    'resuming', 'missing', 'stopping', 'stopped', 'error')),
  -- Raised by every change of status.
  generation bigint not null default 1 check (generation > 0),
  -- The generation of the last command sent to the host: what its events bear.
  command_generation bigint not null default 1 check (command_generation <= generation),
  -- Past it, any replica may settle the row.
  operation_deadline timestamptz(3),
  template text not null,
  snapshot_id text,
  host_id text references hosts,
  vcpus integer not null check (vcpus > 0),
  memory_mb integer not null check (memory_mb > 0),
  disk_mb integer not null check (disk_mb > 0),
  timeout_sec integer not null check (timeout_sec >= 0),
  on_timeout text not null check (on_timeout in ('pause', 'destroy')),
  timeout_mode text not null check (timeout_mode in ('idle', 'absolute')),
  env jsonb not null,
  metadata jsonb not null,
  token_version integer not null default 1,
  disk_used_bytes bigint,
  error_code text,
  error_message text,
  created_at timestamptz(3) not null default now(),
  started_at timestamptz(3),
  expires_at timestamptz(3),
  ended_at timestamptz(3),
  check ((status in ('pending', 'starting', 'pausing', 'resuming', 'stopping')) = (operation_deadline is not null)),
  check ((status in ('stopped', 'error')) = (ended_at is not null)),
  check (host_id is not null or status in ('pending', 'stopping', 'stopped', 'error')),
  check ((error_code is null) = (error_message is null)),
  check (status <> 'error' or error_code is not null)
);
create index sandboxes_newest on sandboxes (team_id, created_at desc, id desc);
create index sandboxes_live on sandboxes (team_id, created_at desc, id desc)
  where status not in ('stopped', 'error');
create index sandboxes_by_host on sandboxes (host_id, id) where status not in ('stopped', 'error');
create index sandboxes_overdue on sandboxes (operation_deadline) where operation_deadline is not null;
create index sandboxes_metadata on sandboxes using gin (metadata jsonb_path_ops);

create table idempotency_keys (
  team_id text not null references teams on delete cascade,
  key text not null,
  fingerprint text not null,
  -- Who works at it, and until when it may be believed to live.
  claim text not null,
  claimed_until timestamptz(3) not null,
  status integer,
  -- Sealed: answers may hold secrets that are shown once.
  sealed_body bytea,
  expires_at timestamptz(3) not null,
  primary key (team_id, key),
  check ((status is null) = (sealed_body is null))
);
create index idempotency_keys_expired on idempotency_keys (expires_at);
